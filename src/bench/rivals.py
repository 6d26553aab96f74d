"""Programs that are timed in turn, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Rival:
    """A process that runs ``work(connection, *given)``, which is to end in :func:`serve`; ready once made.

    Processes of their own share neither allocator, nor caches, nor settings, so that each is timed, and its memory
    counted, as if it were alone; between its turns it only holds memory.

    Raises:
        ValueError: the process ended before it was ready.
    """

    def __init__(self, name: str, work: Callable[..., None], *given: Any) -> None:
        self.name = name
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, *given), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self, *request: Any) -> Any:
        """What the process answers to ``request``."""
        self._connection.send(request)
        return self._answer()

    def close(self) -> int:
        """End the process; the most memory, in bytes, that it has held."""
        self._connection.send(None)
        peak = self._answer()
        self._process.join()
        return peak

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise ValueError(
                f"{self.name} ended with exit status {self._process.exitcode}, for what is said above: a smaller "
                f"data.batch_size or model, or peers=[] without it"
            ) from None


def serve(connection: Connection, act: Callable[..., Any]) -> None:
    """Answer requests by ``act`` until there are no more, then tell the peak of memory."""
    connection.send("ready")
    with suppress(EOFError):  # whoever asked has ended
        for request in iter(connection.recv, None):
            connection.send(act(*request))
        connection.send(peak_memory())


def peak_memory() -> int:
    """The most memory, in bytes, that this process has held so far: of the GPU where it has used one."""
    torch = sys.modules.get("torch")  # to import it here would count as what the process needed
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage it does not count the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
