"""Files on the Hugging Face hub and at https addresses: found with their sizes and hashes, fetched one by one."""

import hashlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from src.data import hub
from src.data.config import DataConfig
from src.data.download import fetch, headers_of, user_cache
from src.data.lock import locked
from src.files import sha256_of

log = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class RemoteFile:
    """A file at ``address``, which names a commit if it is on the hub. What the server does not say is None."""

    address: str
    size: int | None
    sha256: str | None = None
    etag: str | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(urlparse(self.address).path).name

    @property
    def described(self) -> dict[str, Any]:
        """What identifies it, for a manifest."""
        identity = {"file": self.address, "bytes": self.size, "sha256": self.sha256, "etag": self.etag}
        return {key: value for key, value in identity.items() if value is not None}

    def place(self, folder: Path) -> Path:
        """Where :meth:`fetch` puts it."""
        path, _, query = re.sub(r"^\w+://(datasets/)?", "", self.address).partition("?")
        *folders, name = (part for part in PurePosixPath(path).parts if part != "..")
        if query:
            folders.append(hashlib.sha256(query.encode()).hexdigest()[:16])
        return folder.joinpath(*folders, name)

    def fetch(self, folder: Path, key: str) -> Path:
        """The file, below ``folder``. It is fetched unless it is there, and appears once it is whole and its size and
        SHA-256 are right. One process at a time may fetch into a folder.

        Raises:
            ValueError: it cannot be fetched or is not what was found. The message blames the override ``key``.
        """
        place = self.place(folder)
        if place.is_file():
            return place
        log.info("fetching %s%s", self.address, f", {self.size / 1e6:,.1f} MB" if self.size else "")
        found = self._download(folder / ".part", key)
        size = found.stat().st_size
        if self.size not in (None, size) or (self.sha256 and sha256_of(found) != self.sha256):
            found.unlink()
            problem = "has a wrong SHA-256" if size == self.size else f"has {size:,} bytes instead of {self.size:,}"
            raise ValueError(f"{key}={self.address} arrived damaged, it {problem}; repeat the command, which continues")
        place.parent.mkdir(parents=True, exist_ok=True)
        found.replace(place)
        shutil.rmtree(folder / ".part", ignore_errors=True)  # with what killed processes left
        return place

    def _download(self, folder: Path, key: str) -> Path:
        if hub.is_address(self.address):
            return hub.download(self.address, key, folder)
        return fetch([self.address], None, self.size, folder, key)


def find_remote(address: str, key: str, endings: tuple[str, ...]) -> list[RemoteFile]:
    """The file at an https ``address``, or the files that ``hf://datasets/<owner>/<name>[@<revision>]/<glob>`` matches,
    sorted. A folder on the hub stands for the files in it with one of ``endings``. Nothing is fetched.

    Raises:
        ValueError: no such file, no access, or no network. The message blames the override ``key``.
    """
    if hub.is_address(address):
        return [RemoteFile(*file) for file in hub.find(address, key, endings)]
    headers = headers_of(address, key)
    size = headers.get("Content-Length")
    return [RemoteFile(address, int(size) if size else None, etag=headers.get("ETag", "").strip('"') or None)]


def shards_of(config: DataConfig) -> str | list[Path]:
    """Where the shards of ``config`` are, after those at its ``url`` are fetched.

    Raises:
        ValueError: shards of a named corpus that are not made yet, or cannot be fetched.
    """
    if config.path is None:
        assert config.url is not None
        return fetch_shards(config.url, config.train_shards or 1)
    if config.prepare and not (os.path.exists(os.path.expanduser(config.path)) or set(config.path) & set("*?[")):
        raise ValueError(f"data.path={config.path} does not exist; {config.cure_for_no_shards}")
    return config.path


def fetch_shards(url: str, train_shards: int) -> list[Path]:
    """The validation shard and the first ``train_shards`` training shards at ``url``, in the user's cache. ``{}`` in
    ``url`` stands for ``val_000000`` and ``train_000001``, ``train_000002``, ..., as modded-nanogpt names its shards.
    There are no requests if the cache has all shards and ``url`` names a commit.

    Raises:
        ValueError: shards that do not exist or cannot be fetched; a cache that cannot be written to.
    """
    names = ["val_000000", *(f"train_{number:06d}" for number in range(1, train_shards + 1))]
    folder = user_cache() / "shards"
    places = [RemoteFile(url.replace("{}", name), None).place(folder) for name in names]
    if all(place.is_file() for place in places):
        return places
    files = {file.name: file for file in find_remote(url.replace("{}", "*"), "data.url", (".bin",))}
    if missing := [place.name for place in places if place.name not in files]:
        cure = f"data.train_shards={train_shards - len(missing)}"
        raise ValueError(f"data.train_shards={train_shards}: {url} has no {missing[0]}; use {cure}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", f"fetches shards into {folder}"):
            return [files[place.name].fetch(folder, "data.url") for place in places]
    except OSError as error:
        raise ValueError(
            f"data.url={url} cannot be written to {folder} ({error.strerror}); free some space, or use "
            f"data.path=<shards fetched to another disk>"
        ) from error
