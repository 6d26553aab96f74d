"""Signals that stop a run."""

import os
import signal
import threading
from contextlib import suppress
from typing import Any

# SLURM sends SIGUSR1 shortly before the time limit; SIGHUP arrives when the terminal is closed.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def heeded_signals() -> list[signal.Signals]:
    """:data:`SIGNALS`, without SIGHUP if it is ignored already, as under ``nohup``."""
    return [signum for signum in SIGNALS if signum.name != "SIGHUP" or signal.getsignal(signum) is not signal.SIG_IGN]


class Interrupted(SystemExit):
    """A signal stopped the run. The exit status is 128 + the signal's number, as a shell reports it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)
        self.told = False  # whether the user has seen a message


class Interruption:
    """A context in which the first of :data:`SIGNALS` raises :class:`Interrupted` and later ones do nothing.

    While ``deferred`` is true, the signal is only kept in ``requested``, and :meth:`check` raises once everything is
    saved. ``reports`` prints a line in that case; of several ranks, one should.
    """

    def __init__(self, reports: bool = True) -> None:
        self.reports = reports
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
        """Install the handlers, again if another library has replaced them."""
        if threading.current_thread() is threading.main_thread():
            for signum in heeded_signals():
                before = signal.signal(signum, self._handle)
                self._before.setdefault(signum, before)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal was deferred."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _handle(self, signum: int, _: Any) -> None:
        # Data workers inherit this handler, and schedulers signal every process of a job: the run ends its own workers.
        if os.getpid() != self._process or self.requested is not None:
            return
        self.requested = signal.Signals(signum)
        if not self.deferred:
            raise Interrupted(signum)
        if self.reports:
            with suppress(OSError):  # the terminal may be closed
                # os.write is safe in a signal handler.
                os.write(2, f"{self.requested.name}: finishing the step, then saving\n".encode())
