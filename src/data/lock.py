"""One process at a time."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, waiting_for: str | None = None) -> Iterator[None]:
    """Only one process at a time holds the lock file ``path``, also of several machines that share the disk.

    ``waiting_for`` is what another process does while this one waits for it, for the log.

    Raises:
        filelock.Timeout: another process holds the lock and ``waiting_for`` is None.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting_for is None:
            raise
        log.info("waiting for another process that %s", waiting_for)
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove an open file
            path.unlink()
        lock.release()
