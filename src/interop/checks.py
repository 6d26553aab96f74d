"""What is checked of files that others wrote: the sizes that they claim, and their tensors."""

from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from src.model.config import GPTConfig

BUFFERS = (".attn.bias", ".attn.masked_bias", ".att.mask")  # masks that some files contain
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
SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")


def config_of(**values: Any) -> GPTConfig:
    """A config of ``values`` from a file.

    Raises:
        ValueError: an impossible value, or a size that is not an integer: ``"3"``, ``3.0`` and ``true``, which an
            override may be, are signs of a damaged file.
    """
    if wrong := [key for key in SIZES if type(values[key]) is not int]:
        raise ValueError(f"model.{wrong[0]}={shown(values[wrong[0]])} is not an integer")
    return GPTConfig(**values)


def check_tensors(tensors: Any) -> None:
    """Raise a ValueError unless ``tensors`` maps names to dense tensors that do not claim more memory than the file
    holds: tensors may share memory, and would take many times as much once copied."""
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise ValueError("it holds no tensors by name")
    claimed, storages = 0, []
    for name, tensor in tensors.items():
        if not _is_dense(tensor):
            raise ValueError(f"{name[:100]} is not a dense tensor")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name[:100]} is of type {str(tensor.dtype)[6:]}, not float32, float16 or bfloat16")
        storage = tensor.untyped_storage()
        storages.append((storage.data_ptr(), storage.nbytes()))
        if not name.endswith(BUFFERS):  # these are dropped, and all layers often share one
            claimed += tensor.nbytes
    held = end = 0
    for begin, size in sorted(storages):  # storages may overlap
        held += max(begin + size - max(begin, end), 0)
        end = max(begin + size, end)
    if claimed > 2 * held:  # a tied head counts twice
        raise ValueError(f"its tensors claim {claimed:,} bytes, the file holds {held:,}")


def _is_dense(tensor: Any) -> bool:
    if type(tensor) not in (Tensor, Parameter) or tensor.is_nested or tensor.layout != torch.strided:
        return False
    repeats = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.device.type == "cpu" and not repeats
