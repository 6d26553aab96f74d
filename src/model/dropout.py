"""Dropout (Srivastava et al. 2014) whose random numbers cost less than the matrix products beside it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.drop_rate, self.training)

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}"


def dropout(x: Tensor, drop_rate: float, training: bool) -> Tensor:
    """``x`` with each element zeroed with probability ``drop_rate``, the others divided by ``1 - drop_rate``.

    On the CPU PyTorch draws one number after another for each element, which takes a sixth of a training step of GPT-2
    small; here the bits of one 64-bit number decide for four elements of 16 bits or two of 32. The probability is that
    of an integer threshold: right to 2**-16 or 2**-32.
    """
    if not training or not drop_rate:
        return x
    if x.device.type != "cpu" or x.dtype.itemsize > 4 or torch.compiler.is_compiling():
        return F.dropout(x, drop_rate)
    return x * keep_mask(x.shape, drop_rate, x.dtype)


def keep_mask(shape: torch.Size, drop_rate: float, dtype: torch.dtype) -> Tensor:
    """A tensor of ``shape`` that holds ``1 / (1 - drop_rate)`` or, with probability ``drop_rate``, 0."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    largest = torch.iinfo(integer).max
    words = -(-shape.numel() * dtype.itemsize // 8)
    random = torch.empty(words, dtype=torch.int64).random_(-(2**63), None).view(integer)[: shape.numel()]
    below = min(round(drop_rate * (largest + 1)), largest)  # random & largest < below: drop
    sign = (below - 1 - (random & largest)) >> largest.bit_length()  # -1, all bits set: keep; 0: drop
    kept = torch.tensor(1 / (1 - drop_rate), dtype=dtype).view(integer)
    return (sign & kept).view(dtype).view(shape)
