"""The rates at which the machine multiplies matrices and reads memory."""

from multiprocessing.connection import Connection

import torch

from src.bench.rivals import serve
from src.device import matrix_rate, seconds_of

READS = 10  # of a buffer far larger than any cache; a single read is faster than any longer work


def work(connection: Connection, device: str, dtype: torch.dtype) -> None:
    """A rival that answers ``matrix`` with operations per second in ``dtype``, and ``read`` with bytes per second."""
    size = 4096 if device == "cpu" else 8192
    large = torch.ones(2**28, device=device)

    def rate(what: str) -> float:
        if what == "matrix":
            return matrix_rate(device, dtype, size)
        return READS * large.nbytes / seconds_of(lambda: [large.sum() for _ in range(READS)], device)

    serve(connection, rate)
