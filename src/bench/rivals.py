"""Programs that are timed in turn, each in its own process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from src.memory import peak_memory


class Rival:
    """A process that runs ``work(connection, *given)``, which must end in :func:`serve`; ready once constructed.

    Separate processes share neither allocator, nor caches, nor settings, so that each is timed, and its memory counted,
    as if it ran alone. Between its turns a process only holds memory.

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
        """The answer of the process to ``request``."""
        self._connection.send(request)
        return self._answer()

    def close(self) -> int:
        """End the process and return its peak memory in bytes."""
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
                f"{self.name} ended with exit status {self._process.exitcode}, see the lines above; "
                f"use a smaller data.batch_size or model, or peers=[] to leave it out"
            ) from None


def serve(connection: Connection, act: Callable[..., Any]) -> None:
    """Answer each request with ``act(*request)`` until there are no more, then report the peak memory."""
    connection.send("ready")
    with suppress(EOFError):  # the asking process has ended
        for request in iter(connection.recv, None):
            connection.send(act(*request))
        connection.send(peak_memory())


def in_turn(turns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """The results of each of ``turns``: called once to warm up, then one after another, ``rounds`` times."""
    for turn in turns.values():
        turn()
    found: dict[str, list[Any]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            found[name].append(turn())
    return found
