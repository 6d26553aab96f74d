"""A pinned file from the network: https only, fetched once, with its hash and size known beforehand."""

import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse


def user_cache() -> Path:
    """The project's folder in the user's cache, which may not exist yet."""
    import pooch

    return Path(pooch.os_cache("gpt2-lightning"))


def fetch(urls: list[str], sha256: str | None, size: int | None = None) -> Path:
    """The file at the first of ``urls`` that has it, in the user's cache under the name in the first address.

    It gets this name once its SHA-256 is right. ``size`` is the most bytes it may have.

    Raises:
        ValueError: an address that is not https; no address that offers the pinned content.
    """
    import pooch  # only a first use needs it

    for url in urls:
        if urlparse(url).scheme != "https":
            raise ValueError(f"data.url={url} is not https; use data.path=<a copy on this machine>")
    name = Path(urlparse(urls[0]).path).name
    pooch.get_logger().setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the error below says what failed
    reasons = []
    for url in urls:
        try:
            found = pooch.retrieve(url, sha256, name, user_cache(), downloader=_downloader(size))
            return Path(found)
        except (OSError, ValueError) as error:  # no network, no such page, wrong content
            reasons.append(f"{urlparse(url).netloc}: {str(error).splitlines()[0][:80]}")
    raise ValueError(
        f"data.url={urls[0]} could not be fetched ({'; '.join(reasons)}); use data.path=<a copy on this machine>"
    )


def _downloader(size: int | None) -> Callable[..., None]:
    def download(url: str, target: str, _pooch: object) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        with requests.Session() as session:
            retries = Retry(3, backoff_factor=0.5, status_forcelist=(502, 503))
            session.mount("https://", HTTPAdapter(max_retries=retries))
            session.adapters.pop("http://")  # a redirection must not lead to it
            with session.get(url, stream=True, timeout=20) as response, open(target, "wb") as file:
                response.raise_for_status()
                for block in response.iter_content(2**16):
                    file.write(block)
                    if size is not None and file.tell() > size:
                        raise ValueError(f"more than the {size:,} bytes that it should have")

    return download
