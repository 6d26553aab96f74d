"""The head and its cross-entropy in one: the logits are overwritten by their own gradient."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 512  # whose float32 logits exist at a time: 0.1 GB


def next_token_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, reduction: str = "mean", compiled: bool = False
) -> Tensor:
    """Cross-entropy in nats per token (``mean``), or its ``sum``, of the logits that ``head`` ``(V, C)`` makes of
    ``hidden`` ``(B, T, C)``, against ``targets`` ``(B, T)``, of which those below 0 do not count.

    What ``F.cross_entropy((hidden @ head.T).float(), targets)`` computes, in float32 from the logits on. That keeps the
    logits, their float32 copy, its log-softmax and the gradients of two of them, each ``(B * T, V)``; here the gradient
    takes the place of the logits as soon as they are read (as in Hsu et al. 2024, Liger Kernel, section 3.2).
    ``compiled`` lets ``torch.compile`` make one kernel of that.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    differentiable = torch.is_grad_enabled()  # which forward, called without gradients, cannot ask
    total = _LinearCrossEntropy.apply(hidden.flatten(0, 1), head, targets.flatten(), dtype, compiled, differentiable)
    return total / (targets >= 0).sum() if reduction == "mean" else total


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over N rows, from ``hidden`` ``(N, C)``, ``head`` ``(V, C)`` and ``targets`` ``(N,)``, multiplied in
    ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        compiled: bool,
        differentiable: bool,
    ) -> Tensor:
        losses = _compiled_losses() if compiled else _losses
        differentiable &= any(ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = head.to(dtype)
            logits = hidden.to(dtype) @ cast.T  # (N, V)
            parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
            total = torch.stack([losses(part, wanted, differentiable) for part, wanted in parts]).sum()
        ctx.save_for_backward(hidden, cast, logits)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, gradient = ctx.saved_tensors  # (N, C), (V, C), (N, V)
        of_hidden = of_head = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_hidden = (gradient @ head).to(hidden.dtype) * grad  # (N, C)
            if ctx.needs_input_grad[1]:
                of_head = (gradient.T @ (hidden * grad).to(head.dtype)).to(ctx.head_dtype)  # (V, C)
        return of_hidden, of_head, None, None, None, None


@functools.cache
def _compiled_losses() -> Callable[..., Tensor]:
    return torch.compile(_losses)


def _losses(logits: Tensor, targets: Tensor, differentiable: bool) -> Tensor:
    """The sum of the losses of a few rows ``(n, V)``, which become their gradients."""
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (n, V)
    counted = (targets >= 0).unsqueeze(1)  # (n, 1)
    wanted = targets.clamp(min=0).unsqueeze(1)  # (n, 1)
    loss = -(log_probabilities.gather(1, wanted) * counted).sum()
    if differentiable:
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))
        logits.copy_(gradient.mul_(counted))
    return loss
