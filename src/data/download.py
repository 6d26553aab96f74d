"""A pinned file from the network: https only, fetched once, with its hash and size known beforehand."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

if TYPE_CHECKING:
    import requests


def user_cache() -> Path:
    """The project's folder in the user's cache, which may not exist yet."""
    import pooch

    return Path(pooch.os_cache("gpt2-lightning"))


def fetch(
    urls: list[str], sha256: str | None, size: int | None = None, folder: Path | None = None, key: str = "data.url"
) -> Path:
    """The file at the first of ``urls`` that has it, in ``folder`` (None: the user's cache) under the name in the first
    address.

    It gets this name once its SHA-256 is right. ``size`` is the most bytes it may have.

    Raises:
        ValueError: an address that is not https; no address that offers the pinned content. The message blames the
            override ``key``.
    """
    import pooch  # only a first use needs it

    for url in urls:
        _check_https(url, key)
    name = Path(urlparse(urls[0]).path).name
    pooch.get_logger().setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the error below says what failed
    reasons = []
    for url in urls:
        try:
            found = pooch.retrieve(url, sha256, name, folder or user_cache(), downloader=_downloader(size))
            return Path(found)
        except (OSError, ValueError) as error:  # no network, no such page, wrong content
            reasons.append(f"{urlparse(url).netloc}: {str(error).splitlines()[0][:80]}")
    raise ValueError(f"{key}={urls[0]} could not be fetched ({'; '.join(reasons)}); {_cure(key)}")


def headers_of(url: str, key: str) -> Mapping[str, str]:
    """The headers with which the server at ``url`` answers a request for the file, which is not read.

    Raises:
        ValueError: an address that is not https, or that cannot be fetched. The message blames the override ``key``.
    """
    _check_https(url, key)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        with _answer(url) as response:
            return response.headers
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={url} could not be fetched ({str(error).splitlines()[0][:80]}); {_cure(key)}"
        ) from None


def _check_https(url: str, key: str) -> None:
    if urlparse(url).scheme != "https":
        raise ValueError(f"{key}={url} is not https; {_cure(key)}")


def _cure(key: str) -> str:
    if key == "data.url":
        return "use data.path=<a copy on this machine>"
    return f"repeat the command, or use {key}=<a copy on this machine>"


@contextmanager
def _answer(url: str) -> Iterator["requests.Response"]:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    with requests.Session() as session:
        retries = Retry(3, backoff_factor=0.5, status_forcelist=(429, 502, 503), raise_on_status=False)
        session.mount("https://", HTTPAdapter(max_retries=retries))
        session.adapters.pop("http://")  # a redirection must not lead to it
        session.headers["Accept-Encoding"] = "identity"  # the length is that of the file
        with session.get(url, stream=True, timeout=20) as response:
            response.raise_for_status()
            yield response


def _downloader(size: int | None) -> Callable[..., None]:
    def download(url: str, target: str, _pooch: object) -> None:
        with _answer(url) as response, open(target, "wb") as file:
            for block in response.iter_content(2**16):
                file.write(block)
                if size is not None and file.tell() > size:
                    raise ValueError(f"more than the {size:,} bytes that it should have")

    return download
