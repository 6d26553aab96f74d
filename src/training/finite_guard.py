"""What happens when a loss or a gradient is no longer a number."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from src.files import write_json
from src.tokenizer import token_ids_to_text
from src.checkpoint.position import own_data

MAX_ROLLBACKS = 3


class NonFiniteError(ValueError):
    """A step whose loss or gradient is infinite or NaN, met before its update; ``batches`` counts from the run's
    first batch."""

    def __init__(self, message: str, batches: list[int]) -> None:
        super().__init__(message)
        self.batches = batches


@dataclass
class StepSoFar:
    """The batches of the optimizer step under way: their places in the run, inputs ``(B, T)`` and losses."""

    batches: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def add(self, batch: int, inputs: Tensor, loss: Tensor) -> None:
        self.batches.append(batch)
        self.inputs.append(inputs)
        self.losses.append(loss)


def stop(trainer: Trainer, step: StepSoFar, norm: float, lr: float) -> None:
    """Write ``non_finite.json`` into the trainer's root folder: everything about the step that must not be made. To be
    called by all processes of a run.

    Raises:
        NonFiniteError: always.
    """
    own = [(inputs.cpu(), loss.item()) for inputs, loss in zip(step.inputs, step.losses, strict=True)]
    shares = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(shares, own)
    inputs = [torch.cat([rows for rows, _ in batch]) for batch in zip(*shares, strict=True)]  # (B, T) of all processes
    losses = [math.fsum(loss for _, loss in batch) / len(shares) for batch in zip(*shares, strict=True)]
    report = {
        "step": trainer.global_step + 1,
        "lr": lr,
        "grad_norm": norm,
        "batches": [
            {"batch": batch, "loss": loss, "windows": _windows(trainer, batch, inputs)}
            for batch, loss, inputs in zip(step.batches, losses, inputs, strict=True)
        ],
    }
    path = Path(trainer.default_root_dir, "non_finite.json")
    if trainer.is_global_zero:
        write_json(path, report)
    raise NonFiniteError(
        f"step {report['step']} was not made: its loss is {sum(losses) / len(losses):g} and the norm of its gradient "
        f"{norm:g}; its text is in {path}: optimizer.learning_rate=<less than {lr:.1e}>, or finite_guard=rollback to "
        f"go back to the last checkpoint and leave this text out",
        step.batches,
    )


def _windows(trainer: Trainer, batch: int, inputs: Tensor) -> list[dict[str, Any]]:
    data = own_data(trainer)
    offsets = data.token_offsets(*divmod(batch, trainer.num_training_batches)) if data else [None] * len(inputs)
    tokenizer = data and data.tokenizer
    return [
        {"offset": offset, "tokens": row.tolist(), "text": token_ids_to_text(row, tokenizer)}
        for offset, row in zip(offsets, inputs, strict=True)
    ]
