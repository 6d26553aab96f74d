"""Standard output and standard error that may be closed while a run trains."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class LastingStream:
    """``stream`` until a write fails, because a pipe has lost its reader or the terminal was closed; afterwards it
    discards everything and is ``lost``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        self.lost = True
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())  # also for what the stream has buffered, and for other writers
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """A context in which a closed output is no error, not even if the program was started without one (``>&-``)."""
    before = sys.stdout, sys.stderr
    for descriptor in 0, 1, 2:  # in order: otherwise the next file, such as a log, would get their numbers
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in "stdout", "stderr":
        stream = getattr(sys, name)
        setattr(sys, name, LastingStream(open(os.devnull, "w") if stream is None else stream))  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
