"""Strangers' files: what is refused of them, and how that is told."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from src.checkpoint.sealed import printable

BUFFERS = (".attn.bias", ".attn.masked_bias", ".att.mask")  # masks that some files carry along
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
)
LONGEST_REASON = 500  # characters


class RefusedError(ValueError):
    """Weights that are none, in one line with the cure."""


Refuse = Callable[[str], RefusedError]


def refusal(weights: str | Path, key: str) -> Refuse:
    """Makes an error of a reason, whatever the reason quotes from a file: in one line, which a terminal shows as it is.

    ``key`` is the override that named ``weights``.
    """

    def refuse(reason: str) -> RefusedError:
        return RefusedError(f"{key}={weights}: {printable(reason[:LONGEST_REASON])}: {key}=<another file or folder>")

    return refuse


def check_tensors(tensors: Any, refuse: Refuse) -> None:
    """Whether ``tensors`` are names and dense tensors in memory that take no more of it than the file holds."""
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise refuse("it holds no tensors by name")
    claimed, storages = 0, []
    for name, tensor in tensors.items():
        if not _is_dense(tensor):
            raise refuse(f"{name[:100]} is no dense tensor")
        if tensor.dtype not in DTYPES:
            raise refuse(f"{name[:100]} is of type {str(tensor.dtype)[6:]}, not float32, float16 or bfloat16")
        storage = tensor.untyped_storage()
        storages.append((storage.data_ptr(), storage.nbytes()))
        if not name.endswith(BUFFERS):  # which are dropped, and often one for all layers
            claimed += tensor.nbytes
    held = end = 0
    for begin, size in sorted(storages):  # some are shared, or parts of one another
        held += max(begin + size - max(begin, end), 0)
        end = max(begin + size, end)
    if claimed > 2 * held:  # a head tied to the embedding is there twice
        raise refuse(f"its tensors claim {claimed:,} bytes, the file holds {held:,}")


def _is_dense(tensor: Any) -> bool:
    if type(tensor) not in (Tensor, Parameter) or tensor.is_nested or tensor.layout != torch.strided:
        return False
    repeats = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.device.type == "cpu" and not repeats
