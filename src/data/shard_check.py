"""Detects damaged shards by their SHA-256, in the background while a run trains on them."""

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from src.data.download import user_cache
from src.data.lock import locked
from src.data.manifest import MANIFEST, read_manifest
from src.files import read_json, replacing, sha256_of

log = logging.getLogger(__name__)


class ShardCheck:
    """Compares the SHA-256 of ``files`` with those in the manifests beside them, in a thread of the lowest priority.

    Files that are in no manifest are not checked. A file is read once, and again when it has changed: the user's cache
    records which files are verified.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = list(dict.fromkeys(files))
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="shard check", daemon=True)

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def check(self) -> None:
        """Raise the error that has been found so far, if any.

        Raises:
            ValueError: a shard that is not what its manifest says, or cannot be read.
        """
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until every file is read, then :meth:`check`."""
        if self._thread.is_alive():
            log.info("waiting until the shards are compared with their %s, once after each change", MANIFEST)
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
            self._error = ValueError(
                f"data.path: cannot read {error.filename or file} ({error.strerror}); use data.path=<readable shards>"
            )
        except Exception as error:
            self._error = error


def _hashes(folder: Path) -> dict[str, str]:
    return {shard["file"]: shard["sha256"] for shard in (read_manifest(folder) or {"shards": []})["shards"]}


def _verify(file: Path, expected: str) -> None:
    state = [expected, *_state(file)]
    path = os.path.realpath(file)
    if read_json(_verified()).get(path) == state:
        return
    if sha256_of(file) != expected:
        raise ValueError(
            f"data.path: {file} is damaged, its SHA-256 is not the one in {MANIFEST}; make the shards again with "
            f"python -m src.prepare, or use data.path=<a good copy>"
        )
    if state[1:] == _state(file):
        _remember(path, state)


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _verified() -> Path:
    """A JSON object of paths and the SHA-256 and state that their files had when they were verified."""
    return user_cache() / "verified_shards.json"


def _remember(path: str, state: list) -> None:
    known = _verified()
    with suppress(OSError, NotImplementedError):  # no locks on this disk, for instance; then it is read again next time
        known.parent.mkdir(parents=True, exist_ok=True)
        with locked(known.with_suffix(".lock"), "records verified shards"), replacing(known) as part:
            others = {other: state for other, state in read_json(known).items() if os.path.exists(other)}
            part.write_text(json.dumps(others | {path: state}))
