"""A linear layer that reads its weights as fast as the memory gives them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """What ``nn.Linear`` computes. Without gradients, in float32 on the CPU, oneDNN multiplies: for few rows its
    kernels take half to a third of the time of PyTorch's default there. For decoding see :meth:`pack`."""

    packed: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def pack(self) -> None:
        """Put the weights into the order that decoding reads fastest on a CPU: from now on they can only multiply."""
        if self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            kind = _Columns if self.weight.dtype == torch.float32 and _has_fbgemm() else _Reordered
            self.packed = kind(self.weight.detach())
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed(x, self.bias)
        if (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available()
        ):
            return _multiply(x, self.weight, self.bias)
        return super().forward(x)


class _Reordered:
    """Weights in oneDNN's own order: in bfloat16 a row takes two thirds of the time of the plain order."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, self.weight, bias)


class _Columns:
    """Weights ``(N, K)`` transposed, in one part ``(K, N / threads)`` for each thread.

    The product of one row with a part is the sum of the part's rows, each times an element of the row: an embedding
    bag. FBGEMM's kernel for that, made for tables that no cache holds, takes two thirds of oneDNN's time.
    """

    def __init__(self, weight: Tensor) -> None:
        self.outputs, inputs = weight.shape
        threads = torch.get_num_threads()
        padded = F.pad(weight, (0, 0, 0, -self.outputs % threads))
        self.parts = padded.view(threads, -1, inputs).transpose(1, 2).contiguous()  # (P, K, N / P)
        self._rows = torch.arange(threads * inputs, dtype=torch.int32)
        self._starts = inputs * torch.arange(threads, dtype=torch.int32)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() == x.shape[-1]:
            scale = x.expand(len(self.parts), *x.shape).reshape(-1)  # (P * K,)
            table = self.parts.flatten(0, 1)  # (P * K, N / P)
            y = torch.embedding_bag(table, self._rows, self._starts, per_sample_weights=scale)[0]  # (P, N / P)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = torch.cat([_multiply(x, part.t(), None) for part in self.parts], dim=-1)
        y = y[..., : self.outputs]
        return y if bias is None else y + bias


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines
