"""What is fast and safe on the machine at hand."""

import time
from collections.abc import Callable
from typing import Any

import torch


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


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_capabilities().get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"
    return str(device)


def _cpu_capabilities() -> dict:
    return getattr(torch.cpu, "get_capabilities", dict)()  # older releases of PyTorch do not tell


def matrix_rate(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations per second of a product of two square matrices, as measured now."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
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
