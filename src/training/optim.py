"""Which parameters decay, and what the learning rate is at each step."""

import math

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW

from src.training.config import OptimizerConfig, ScheduleConfig


def build_adamw(net: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over every parameter of ``net``; the fused kernel unless the device has none or the config says no."""
    fused = config.fused
    if fused is None:
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in net.parameters())
    return AdamW(
        parameter_groups(net, config),
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.eps,
        fused=fused,
    )


def parameter_groups(net: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Each trainable parameter in exactly one group: with decay, or without."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if config.decay == "all" or parameter.dim() >= 2]
    rest = [parameter for parameter in parameters if config.decay != "all" and parameter.dim() < 2]
    assert len({id(parameter) for parameter in decayed + rest}) == len(parameters) == len(decayed) + len(rest)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_at(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step ``step``, counted from 0, of ``total_steps``."""
    if schedule.name == "constant":
        return peak
    warmup = schedule.resolved_warmup(total_steps)
    min_lr = peak / 10 if schedule.min_lr is None else schedule.min_lr
    if step < warmup:
        return schedule.initial_lr + (peak - schedule.initial_lr) * step / warmup
    if step >= total_steps:
        return min_lr
    progress = (step - warmup) / (total_steps - warmup)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def batches_per_epoch(trainer: Trainer, batches: int) -> int:
    """How many of an epoch's ``batches`` are trained on."""
    limit = trainer.overfit_batches or trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def planned_steps(trainer: Trainer, batches: int) -> float:
    """Optimizer steps of a run over epochs of ``batches`` batches, infinite where neither epochs nor steps bound it.

    What ``trainer.estimated_stepping_batches`` will say once there is a model; known before one is built.
    """
    batches = batches_per_epoch(trainer, batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * epochs if batches else 0
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
