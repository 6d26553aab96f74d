"""A linear layer that reads its weights as fast as the memory gives them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

NARROWEST = 64  # columns that are worth a thread


class Linear(nn.Linear):
    """What ``nn.Linear`` computes. Without gradients, in float32 on the CPU, oneDNN multiplies: for few rows its
    kernels take half to a third of the time of PyTorch's default there. For decoding see :meth:`pack`."""

    packed: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def pack(self) -> None:
        """Put the weights into the order that decoding reads fastest on a CPU: from now on they can only multiply."""
        if self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            kind = _Transposed if self.weight.dtype == torch.float32 and _has_fbgemm() else _Reordered
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


class _Transposed:
    """Weights ``(N, K)`` as ``(K, N)``.

    Their product with one row is the sum of their rows, each times an element of the row: an embedding bag, and of each
    thread's share of the columns one of its own. FBGEMM's kernel for that, made for tables that no cache holds, takes
    down to two thirds of the time of oneDNN's products.
    """

    def __init__(self, weight: Tensor) -> None:
        self.outputs, inputs = weight.shape
        bags = min(torch.get_num_threads(), math.ceil(self.outputs / NARROWEST))
        self.weight = weight.new_zeros(inputs, bags * math.ceil(self.outputs / bags))  # (K, N), N a multiple of bags
        self.weight[:, : self.outputs] = weight.t()
        self._table = self.weight.view(inputs * bags, -1)
        self._rows = torch.arange(inputs * bags, dtype=torch.int32).view(inputs, bags).t().flatten()
        self._starts = inputs * torch.arange(bags, dtype=torch.int32)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() == x.shape[-1]:
            scale = x.expand(len(self._starts), *x.shape).reshape(-1)  # (bags * K,)
            y = torch.embedding_bag(self._table, self._rows, self._starts, per_sample_weights=scale)[0]
            y = y.view(*x.shape[:-1], -1)
        else:
            y = _multiply(x, self.weight.t(), None)
        y = y[..., : self.outputs]
        return y if bias is None else y + bias


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines
