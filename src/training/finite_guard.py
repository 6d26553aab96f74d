"""Before each optimizer step: the gradient's norm is taken, checked, clipped and logged."""

import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from src.checkpoint.position import own_data
from src.files import write_json
from src.tokenizer import token_ids_to_text


class NonFiniteError(ValueError):
    """The loss or the gradient of an optimizer step is infinite or NaN; the step was not made."""


class FiniteGuard(Callback):
    """Refuses a step whose loss or gradient is infinite or NaN, clips its gradient, and logs ``grad_norm``, the norm
    before clipping. The gradient is the mean over the step's micro-batches, also where they are fewer than asked for.

    ``clip_val`` is the largest norm (``algorithm="norm"``) or absolute value (``"value"``); None clips nothing.
    Lightning's own clipping refuses fused optimizers under 16-bit mixed precision. What is known of a refused step goes
    to ``non_finite.json`` in the trainer's root folder.

    Raises:
        NonFiniteError: on every rank, before the weights change.
    """

    def __init__(self, clip_val: float | None = None, algorithm: str | None = None) -> None:
        self.clip_val = clip_val
        self.algorithm = algorithm or "norm"
        self._inputs: list[tuple[int, Tensor]] = []  # of the step under way: the batch's place in the run, (B, T)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inputs = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        if pl_module.batch_index not in pl_module.skip_batches:
            self._inputs.append((pl_module.batch_index, batch[0]))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and optimizer.param_groups[0].get("fused"):  # such optimizers unscale in their step
            scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not pl_module.step_losses:  # all of the step's batches were skipped: change nothing
            optimizer.zero_grad()
        _scale_short_step(trainer, parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm.to(pl_module.device)  # of none: on the CPU
        losses = torch.stack(pl_module.step_losses) if pl_module.step_losses else norm.new_zeros(1)
        finite = trainer.strategy.reduce(losses, reduce_op="mean").isfinite().all()  # the same on every rank
        if scaler is None:  # with a scaler, such a step is left out and the scale lowered
            finite &= norm.isfinite()
        limit = self.clip_val or math.inf
        finite, large = torch.stack([finite, norm > limit]).tolist()  # at once: each reading waits for the device
        if not finite:
            self._refuse(trainer, pl_module.step_losses, norm.item(), optimizer.param_groups[0]["lr"])
        self._inputs = []
        if self.clip_val and self.algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, self.clip_val)
        elif large:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        pl_module.log_exactly(grad_norm=norm)

    def _refuse(self, trainer: Trainer, losses: list[Tensor], norm: float, lr: float) -> NoReturn:
        own = [(inputs.cpu(), loss.item()) for (_, inputs), loss in zip(self._inputs, losses, strict=True)]
        ranks = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, own)
        batches = []
        for (number, _), *of_ranks in zip(self._inputs, *ranks, strict=True):
            inputs = torch.cat([rows for rows, _ in of_ranks])  # (B, T) of all ranks
            loss = math.fsum(loss for _, loss in of_ranks) / len(ranks)
            batches.append({"batch": number, "loss": loss, "windows": _windows(trainer, number, inputs)})
        step, path = trainer.global_step + 1, Path(trainer.default_root_dir, "non_finite.json")
        if trainer.is_global_zero:
            write_json(path, {"step": step, "lr": lr, "grad_norm": norm, "batches": batches})
        loss = sum(batch["loss"] for batch in batches) / len(batches)
        numbers = ",".join(str(batch["batch"]) for batch in batches)
        raise NonFiniteError(
            f"step {step} was not made: its loss is {loss:g} and the norm of its gradient {norm:g}; its text is in "
            f"{path}; use optimizer.learning_rate=<less than {lr:.1e}>, or resume={trainer.default_root_dir} "
            f"'skip_batches=[{numbers}]' to leave this text out"
        )


def _scale_short_step(trainer: Trainer, parameters: list[Parameter]) -> None:
    """Make the gradient the mean over the step's micro-batches where a user's data end an epoch with fewer of them than
    ``accumulate_grad_batches``, by which Lightning divides."""
    accumulate = trainer.accumulate_grad_batches
    left = (trainer.fit_loop.epoch_loop.batch_idx + 1) % accumulate
    if left and trainer.is_last_batch:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(accumulate / left)


def _windows(trainer: Trainer, batch: int, inputs: Tensor) -> list[dict[str, Any]]:
    data = own_data(trainer)
    offsets = data.token_offsets(*divmod(batch, trainer.num_training_batches)) if data else [None] * len(inputs)
    tokenizer = data and data.tokenizer
    return [
        {"offset": offset, "tokens": row.tolist(), "text": token_ids_to_text(row, tokenizer)}
        for offset, row in zip(offsets, inputs, strict=True)
    ]
