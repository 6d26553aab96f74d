"""The optimizer, which parameters decay, and what the learning rate is at each step."""

import math
from collections.abc import Callable

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.model.gpt import GPT
from src.training.muon import MuonAdamW
from src.training.sections import OptimizerConfig, ScheduleConfig


def build_optimizer(net: GPT, config: OptimizerConfig) -> Optimizer:
    """The optimizer of every parameter of ``net`` that ``config.name`` selects from :data:`OPTIMIZERS`."""
    return OPTIMIZERS[config.name](net, config)


def adamw(net: GPT, config: OptimizerConfig) -> Optimizer:
    """AdamW, with its fused kernel unless the device has none or ``config`` says no."""
    return _adamw(parameter_groups(net, config), net, config)


def muon(net: GPT, config: OptimizerConfig) -> Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices, *others = parameter_groups(net, config, net.blocks)
    # an update as large as AdamW's (Liu et al. 2025, section 2.2), so that one learning rate serves both
    rate = config.learning_rate
    own = Muon([matrices], lr=rate, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    return MuonAdamW(own, _adamw(others, net, config))


def _adamw(groups: list[dict], net: GPT, config: OptimizerConfig) -> AdamW:
    fused = config.fused
    if fused is None:
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in net.parameters())
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


# To add an optimizer: a function here, its name in OptimizerConfig.name, and a file in conf/optimizer.
OPTIMIZERS: dict[str, Callable[[GPT, OptimizerConfig], Optimizer]] = {"adamw": adamw, "muon": muon}


def parameter_groups(net: GPT, config: OptimizerConfig, blocks: nn.Module | None = None) -> list[dict]:
    """Each trainable parameter in exactly one group: matrices of ``blocks``, if given, in the first; then those that
    decay, and those that do not.

    Queries, keys and values stay one matrix for Muon: three apart trained no better (val loss 3.488 against 3.485).
    """
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    apart = {id(parameter) for parameter in blocks.parameters() if parameter.dim() == 2} if blocks else set()
    matrices = [parameter for parameter in parameters if id(parameter) in apart]
    others = [parameter for parameter in parameters if id(parameter) not in apart]
    decayed = [parameter for parameter in others if config.decay == "all" or parameter.dim() >= 2]
    rest = [parameter for parameter in others if config.decay != "all" and parameter.dim() < 2]
    everything = [*matrices, *decayed, *rest]
    assert len({id(parameter) for parameter in everything}) == len(parameters) == len(everything)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def apply_settings(optimizer: Optimizer, scheduler: LambdaLR, fresh: Optimizer) -> None:
    """Set a restored ``optimizer`` and its ``scheduler`` to the learning rate, betas and decay of this run's config, as
    in the ``fresh`` one; the checkpoint brought its own."""
    scheduler.base_lrs = [group["lr"] for group in fresh.param_groups]
    for group, new, factor in zip(optimizer.param_groups, fresh.param_groups, scheduler.lr_lambdas, strict=True):
        kept = ("params", "fused")  # fused must match the restored state
        group |= {key: value for key, value in new.items() if key not in kept}
        group |= {"initial_lr": new["lr"], "lr": new["lr"] * factor(scheduler.last_epoch)}


def learning_rate_at(step: int, total_steps: float, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step ``step``, counted from 0, of ``total_steps``."""
    if schedule.name == "constant":
        return peak
    warmup = schedule.resolved_warmup(total_steps)
    min_lr = peak / 10 if schedule.min_lr is None else schedule.min_lr
    if step < warmup:
        return schedule.initial_lr + (peak - schedule.initial_lr) * step / warmup
    if step >= total_steps:
        return min_lr
    if schedule.name == "warmup_cosine":
        progress = (step - warmup) / (total_steps - warmup)
        return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    start = max(warmup, total_steps - schedule.resolved_decay(total_steps))
    if step < start:
        return peak
    progress = (step - start) / (total_steps - start)
    return min_lr + (peak - min_lr) * (1 - (math.sqrt(progress) if schedule.decay == "sqrt" else progress))


def batches_per_epoch(trainer: Trainer, batches: int) -> int:
    """How many of an epoch's ``batches`` are trained on.

    Raises:
        ValueError: their number is not a multiple of ``trainer.accumulate_grad_batches``; an epoch is a whole number
            of steps.
    """
    overfit = trainer.overfit_batches  # pyright: ignore[reportAttributeAccessIssue]  # not declared by Lightning
    key = "overfit_batches" if overfit else "limit_train_batches"
    limit, accumulate = getattr(trainer, key), trainer.accumulate_grad_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if batches % accumulate:
        fits = batches // accumulate * accumulate
        cure = f"trainer.{key}={fits}" if fits else f"trainer.accumulate_grad_batches={batches}"
        raise ValueError(
            f"trainer.{key}={limit} leaves {batches} batches of an epoch, not a multiple of "
            f"trainer.accumulate_grad_batches={accumulate}; use {cure}"
        )
    return batches


def planned_steps(trainer: Trainer, batches: int) -> float:
    """Optimizer steps of a run over epochs of ``batches`` batches (see :func:`batches_per_epoch`), infinite where
    neither epochs nor steps bound it.

    What ``trainer.estimated_stepping_batches`` will say once there is a model; known before one is built.
    """
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = batches // trainer.accumulate_grad_batches * epochs if batches else 0
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
