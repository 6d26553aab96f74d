"""Signals that ask a run to stop."""

import os
import signal
import threading
from contextlib import suppress
from typing import Any

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # time almost up under SLURM; the terminal has gone
    if hasattr(signal, name)
]


def heeded_signals() -> list[signal.Signals]:
    """:data:`SIGNALS` without a SIGHUP that is ignored already, as under ``nohup``."""
    return [signum for signum in SIGNALS if signum.name != "SIGHUP" or signal.getsignal(signum) is not signal.SIG_IGN]


class Interrupted(SystemExit):
    """A run was asked to stop; its exit status is 128 and the signal's number, as a shell reports it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)
        self.told = False  # to the user


class Interruption:
    """While this context lasts, the first of :data:`SIGNALS` raises :class:`Interrupted`.

    Where ``deferred`` is true it is only noted, for :meth:`check` to raise once everything is saved. Later signals do
    nothing.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks  # one process of a run does
        self.requested: signal.Signals | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "Interruption":
        self.install()
        return self

    def __exit__(self, *_: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def install(self) -> None:
        """Listen; again, where another library has taken the signals over."""
        if threading.current_thread() is threading.main_thread():
            for signum in heeded_signals():
                before = signal.signal(signum, self._handle)
                self._before.setdefault(signum, before)

    def check(self) -> None:
        """Raise what was noted."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _handle(self, signum: int, _: Any) -> None:
        if os.getpid() != self._process or self.requested is not None:
            return  # a data worker inherits this, and schedulers signal all of a job: the run stops its workers itself
        self.requested = signal.Signals(signum)
        if self.deferred and self.speaks:
            with suppress(OSError):  # the terminal may have gone
                os.write(2, f"{self.requested.name}: finishing the step, then saving\n".encode())  # safe in a handler
        if not self.deferred:
            raise Interrupted(signum)
