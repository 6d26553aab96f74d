"""The head and its cross-entropy in one operation, in which the gradient overwrites the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from src.kernels.training import CompiledTraining, compiled
from src.model.gpt import GPT

ROWS = 512  # whose float32 logits exist at a time: 0.1 GB
COMPILED_ROWS = 16_384  # per call, of which none exists in float32; with GPT-2's vocabulary 32 bits index them
SCALES = {torch.float16: 2.0**10}  # of stored gradients, of which those below 6e-8 would be 0


def fused_loss(net: GPT, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The cross-entropy of ``net``'s logits of ``inputs`` ``(B, T)``; see :func:`head_and_loss`."""
    compiling = isinstance(net, CompiledTraining) and torch.is_grad_enabled()
    return head_and_loss(net.hidden_states(inputs), net.head.weight, targets, reduction, compiling)


def head_and_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, reduction: str = "mean", compiling: bool = False
) -> Tensor:
    """``F.cross_entropy((hidden @ head.T).float(), targets, reduction=reduction)``, in nats.

    ``hidden`` ``(B, T, C)``, ``head`` ``(V, C)``, ``targets`` ``(B, T)``, of which those below 0 are ignored;
    ``reduction`` is ``mean`` or ``sum``. ``compiling`` lets ``torch.compile`` make one kernel of the loss, which
    computes softmax and gradient in two passes over the logits and holds no float32 copy of them.

    The plain form holds several tensors of ``(B * T, V)``: the logits, their float32 copy, its log-softmax, and the
    gradients of two of them. Here the gradient is computed in the forward pass and takes the place of the logits, as
    in Liger Kernel (Hsu et al. 2024, section 3.2).

    Gain: 1.05 in float32 on Intel, forward and backward, and one tensor of ``(B * T, V)``.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    total = _HeadAndLoss.apply(hidden.flatten(0, 1), head, targets.flatten(), dtype, compiling, differentiable)
    return total / (targets >= 0).sum() if reduction == "mean" else total


class _HeadAndLoss(torch.autograd.Function):
    """The sum of the losses of N rows, of ``hidden`` ``(N, C)``, ``head`` ``(V, C)`` and ``targets`` ``(N,)``,
    multiplied in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        compiling: bool,
        differentiable: bool,
    ) -> Tensor:
        losses, size = (compiled(_fused_losses), COMPILED_ROWS) if compiling else (_losses, ROWS)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, cast = hidden.to(dtype), head.to(dtype)
            logits = inputs @ cast.T if differentiable else None  # (N, V), all of them for the gradient only
            parts = logits.split(size) if logits is not None else (rows @ cast.T for rows in inputs.split(size))
            pairs = zip(parts, targets.split(size), strict=True)
            total = torch.stack([losses(part, wanted, differentiable) for part, wanted in pairs]).sum()
        ctx.save_for_backward(hidden, cast, logits)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, gradient = ctx.saved_tensors  # (N, C), (V, C), (N, V)
        of_hidden = of_head = None
        grad = grad / SCALES.get(gradient.dtype, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_hidden = (gradient @ head).to(hidden.dtype) * grad  # (N, C)
            if ctx.needs_input_grad[1]:
                of_head = (gradient.T @ (hidden * grad).to(head.dtype)).to(ctx.head_dtype)  # (V, C)
        return of_hidden, of_head, None, None, None, None


def _losses(logits: Tensor, targets: Tensor, differentiable: bool) -> Tensor:
    """The sum of the losses of a few rows ``(n, V)``, whose gradient overwrites them if ``differentiable``."""
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (n, V)
    counted = (targets >= 0).unsqueeze(1)  # (n, 1)
    wanted = targets.clamp(min=0).unsqueeze(1)  # (n, 1)
    loss = -(log_probabilities.gather(1, wanted) * counted).sum()
    if differentiable:
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))
        logits.copy_(gradient.mul_(counted * SCALES.get(logits.dtype, 1)))
    return loss


def _fused_losses(logits: Tensor, targets: Tensor, differentiable: bool) -> Tensor:
    """:func:`_losses` without an operation that needs the gradient in a buffer of its own before it is stored."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (n, V)
    wanted = targets.unsqueeze(1)  # (n, 1)
    counted = wanted >= 0
    hit = torch.arange(x.shape[1], device=x.device) == wanted  # (n, V)
    top = x.amax(1, keepdim=True)
    total = (x - top).exp().sum(1, keepdim=True)
    picked = torch.where(hit, x, 0.0).sum(1, keepdim=True)  # gather would read x after it is overwritten
    if differentiable:
        gradient = (x - top).exp() / total - hit.to(x.dtype)
        logits.copy_(gradient * (counted * SCALES.get(logits.dtype, 1)))
    return ((total.log() + top - picked) * counted).sum()
