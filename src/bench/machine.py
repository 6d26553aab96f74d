"""What the machine can do: the rates of its matrix products and of reading its memory."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from src.bench.rivals import serve


def work(connection: Connection, device: str, dtype: torch.dtype) -> None:
    """A rival that answers ``matrix`` (operations per second in ``dtype``) and ``read`` (bytes per second)."""
    large = torch.ones(2**26 if device == "cpu" else 2**30, device=device)
    serve(connection, lambda what: matrix_rate(device, dtype) if what == "matrix" else _read_rate(large))


def matrix_rate(device: str, dtype: torch.dtype, sizes: tuple[int, ...] | None = None) -> float:
    """Operations per second of the fastest square matrix product among ``sizes``."""
    rates = []
    for size in sizes or ((1024, 2048, 4096) if device == "cpu" else (4096, 8192)):
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        rates.append(2 * size**3 / _seconds(lambda a=a, b=b: a @ b, device))
    return max(rates)


def _read_rate(large: torch.Tensor) -> float:
    return large.nbytes / _seconds(large.sum, large.device.type)


def _seconds(act: Callable, device: str, repeats: int = 3) -> float:
    """The shortest of a few calls, after one to warm up."""
    shortest = float("inf")
    for _ in range(repeats + 1):
        synchronise(device)
        started = time.perf_counter()
        act()
        synchronise(device)
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
