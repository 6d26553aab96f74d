"""Whether prepared shards still are what they were when they were made, found out while a run trains on them."""

import hashlib
import json
import logging
import os
import sys
import threading
import uuid
from contextlib import suppress
from pathlib import Path

from src.data.download import CACHE_NAME
from src.data.shards import MANIFEST, read_manifest

log = logging.getLogger(__name__)

BLOCK = 2**20  # bytes read at a time
VERIFIED = "verified_shards.json"


class ShardCheck:
    """Compares the SHA-256 of ``files`` with those in the manifests beside them, in a thread of the lowest priority.

    Files that no manifest names are left alone. A file is read once, and again when it has changed: which are verified
    is kept in the user's cache.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = list(dict.fromkeys(files))
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="shard check", daemon=True)

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def check(self) -> None:
        """Raise what has been found so far.

        Raises:
            ValueError: a shard that is not what its manifest says, or cannot be read.
        """
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until every file is read, then :meth:`check`."""
        if self._thread.is_alive():
            log.info("comparing the shards with their %s, once after each change", MANIFEST)
        if self._thread.ident is not None:
            self._thread.join()
        self.check()

    def _run(self) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            manifests = {folder: _hashes(folder) for folder in {file.parent for file in self.files}}
            for file in self.files:
                if expected := manifests[file.parent].get(file.name):
                    _verify(file, expected)
        except OSError as error:
            self._error = ValueError(f"data.path: cannot read {error.filename} ({error.strerror}): data.path=<shards>")
        except Exception as error:
            self._error = error


def _hashes(folder: Path) -> dict[str, str]:
    return {shard["file"]: shard["sha256"] for shard in (read_manifest(folder) or {"shards": []})["shards"]}


def _verify(file: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        state = [expected, *_state(stream.fileno())]
        if _verified().get(os.path.realpath(file)) == state:
            return
        while block := stream.read(BLOCK):
            digest.update(block)
        if digest.hexdigest() != expected:
            raise ValueError(
                f"data.path: {file} is damaged, its SHA-256 is not the one in {MANIFEST}: make the shards again with "
                f"python -m src.prepare, or data.path=<a good copy>"
            )
        if state[1:] == _state(stream.fileno()):
            _remember(os.path.realpath(file), state)


def _state(descriptor: int) -> list[int]:
    stat = os.fstat(descriptor)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache(CACHE_NAME)) / VERIFIED


def _verified() -> dict[str, list]:
    try:
        known = json.loads(_cache().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(path: str, state: list) -> None:
    known = {other: state for other, state in _verified().items() if os.path.exists(other)}
    cache = _cache()
    part = cache.with_name(f"{VERIFIED}.{uuid.uuid4().hex}.part")
    with suppress(OSError):  # then it is read again next time
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(known | {path: state}))
            part.replace(cache)
        finally:
            part.unlink(missing_ok=True)
