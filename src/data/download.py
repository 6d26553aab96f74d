"""A pinned file from the network: https only, fetched once, with its hash and size known beforehand."""

import logging
from pathlib import Path
from urllib.parse import urlparse

CACHE_NAME = "gpt2-lightning"


def fetch(urls: list[str], sha256: str | None, size: int | None = None) -> Path:
    """The cached file that any of ``urls`` offers, in their order; its name is that of the first.

    It is written beside its place in the cache and renamed once its SHA-256 is right; ``size`` bounds its bytes.

    Raises:
        ValueError: an address that is not https; nowhere to be had; other content than was pinned.
    """
    import pooch  # only a first use needs it

    for url in urls:
        if urlparse(url).scheme != "https":
            raise ValueError(f"data.url={url} is not https: data.path=<a copy on this machine>")
    name = Path(urlparse(urls[0]).path).name
    pooch.get_logger().setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what finally failed is told below
    reasons = []
    for url in urls:
        try:
            found = pooch.retrieve(url, sha256, name, pooch.os_cache(CACHE_NAME), downloader=_downloader(size))
            return Path(found)
        except (OSError, ValueError) as error:  # no network, no such page, wrong content
            reasons.append(f"{urlparse(url).netloc}: {str(error).splitlines()[0][:80]}")
    raise ValueError(
        f"data.url={urls[0]} could not be fetched ({'; '.join(reasons)}): data.path=<a copy on this machine>"
    )


def _downloader(size: int | None):
    def download(url: str, target: str, _pooch: object) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        with requests.Session() as session:
            session.mount(
                "https://", HTTPAdapter(max_retries=Retry(3, backoff_factor=0.5, status_forcelist=(502, 503)))
            )
            session.adapters.pop("http://")  # nor after a redirection
            with session.get(url, stream=True, timeout=20) as response, open(target, "wb") as file:
                response.raise_for_status()
                for block in response.iter_content(2**16):
                    file.write(block)
                    if size is not None and file.tell() > size:
                        raise ValueError(f"more than the {size:,} bytes that it should have")

    return download
