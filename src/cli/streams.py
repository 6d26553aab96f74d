"""Standard output and standard error that may go away while a run trains."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class LastingStream:
    """``stream``, which from the first failure on, as of a pipe without a reader or a closed terminal, takes everything
    and shows nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())  # for what the stream still holds, and for other writers
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """While this lasts, a program never fails because nobody takes its output, not even if it was started without
    (``>&-``)."""
    before = sys.stdout, sys.stderr
    for descriptor in 0, 1, 2:  # in this order: what is opened next gets the lowest that is free, a log file for one
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
