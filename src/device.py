"""What is fast and safe on the machine at hand."""

import time
from collections.abc import Callable
from typing import Any

import torch

from src.memory import free_memory

DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


def pick_accelerator(accelerator: str, key: str = "trainer.accelerator") -> str:
    """``accelerator``, with ``auto`` and ``gpu`` resolved to ``cuda``, ``mps`` or ``cpu`` as Lightning would.
    ``key`` is the override that named it.

    Raises:
        ValueError: an accelerator that this machine does not have.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}.get(accelerator, (accelerator,))
    for name in wanted:
        if present.get(name, True):
            return name
    raise ValueError(f"{key}={accelerator} is not on this machine: {key}=auto")


def pick_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 natively, else ``32-true``."""
    if accelerator == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator == "cpu":
        native = any(
            _cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16")
        )
    else:
        native = False
    return "bf16-mixed" if native else "32-true"


def in_precision(precision: str, device: str) -> tuple[torch.dtype, torch.autocast]:
    """The type of the weights in ``precision``, one of Lightning's names, and the context in which a model computes."""
    bits, _, kind = precision.partition("-")
    mixed = kind == "mixed"
    context = torch.autocast(device, DTYPES[bits] if mixed else torch.bfloat16, enabled=mixed)
    return torch.float32 if mixed else DTYPES[bits], context


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_capabilities().get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"
    return str(device)


def free_on(device: torch.device) -> int | None:
    """Bytes of memory that ``device`` has free; None where that is not known."""
    if device.type == "cuda":  # what PyTorch has cached is free to it
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_memory() if device.type == "cpu" else None


def _cpu_capabilities() -> dict:
    return getattr(torch.cpu, "get_capabilities", dict)()  # older releases of PyTorch do not tell


def matrix_rate(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations per second of a product of two square matrices, as measured now.

    They are random: a GPU multiplies matrices of ones about 13 % faster.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    return 2 * size**3 / shortest_seconds(lambda: a @ b, device)


def shortest_seconds(act: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """Of a few calls, after one to warm up."""
    return min(seconds_of(act, device) for _ in range(repeats + 1))


def seconds_of(act: Callable[[], Any], device: str) -> float:
    """Of one call, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    act()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine or of an accelerator, for which PyTorch has several errors."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "allocate memory" in str(error)
