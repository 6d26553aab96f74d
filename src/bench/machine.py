"""What the machine can do: the rates of its matrix products and of reading its memory."""

from multiprocessing.connection import Connection

import torch

from src.bench.rivals import serve
from src.training.device import matrix_rate, shortest_seconds


def work(connection: Connection, device: str, dtype: torch.dtype) -> None:
    """A rival that answers ``matrix`` (operations per second in ``dtype``) and ``read`` (bytes per second)."""
    size = 4096 if device == "cpu" else 8192
    large = torch.ones(2**26 if device == "cpu" else 2**30, device=device)

    def rate(what: str) -> float:
        if what == "matrix":
            return matrix_rate(device, dtype, size)
        return large.nbytes / shortest_seconds(large.sum, device)

    serve(connection, rate)
