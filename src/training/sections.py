"""The sections of a training run's configuration: optimizer, schedule, evaluation, checkpoints."""

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from src.config import Config, refuse

EVALUATIONS = 25  # in a run
EVAL_SHARE, EVAL_TOKENS = 1 / 500, 4096


class OptimizerConfig(Config):
    """``adamw`` (Loshchilov & Hutter 2019), or ``muon`` (Jordan et al. 2024) with ``momentum`` for the matrices of the
    blocks and AdamW for everything else; ``name`` is a key of :data:`~src.training.optim.OPTIMIZERS`. ``decay`` selects
    what ``weight_decay`` applies to: ``matrices`` (neither biases nor layer norms) or ``all``. ``fused=None`` picks
    AdamW's fused kernel where the device has one."""

    section: ClassVar[str] = "optimizer"

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=6e-4, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.95))
    eps: float = Field(default=1e-8, gt=0, lt=1)
    decay: Literal["matrices", "all"] = "matrices"
    fused: bool | None = None
    momentum: float = Field(default=0.95, ge=0, lt=1)

    @model_validator(mode="after")
    def _betas_are_below_one(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must lie in [0, 1); use 'optimizer.betas=[0.9,0.95]'")
        return self


class ScheduleConfig(Config):
    """The learning rate as a function of the optimizer step.

    ``warmup_cosine`` rises linearly from ``initial_lr`` to the optimizer's learning rate, then follows a half cosine to
    ``min_lr`` (Loshchilov & Hutter 2017). ``warmup_stable_decay`` has the same warmup, then the peak, and over the last
    ``decay_steps`` falls to ``min_lr`` (Hu et al. 2024, section 4): ``linear``, or ``sqrt``, by 1 - sqrt(share of the
    decay) (Hägele et al. 2024). Steps below 1 are a share of the run; ``min_lr=None`` is a tenth of the peak.
    ``on_resume`` decides what happens to the curve of a run that is extended: ``keep`` it (and stay at its end) or
    ``stretch`` it over the new length. ``constant`` uses none of these.
    """

    section: ClassVar[str] = "schedule"

    name: Literal["constant", "warmup_cosine", "warmup_stable_decay"] = "constant"
    warmup_steps: float = Field(default=0.2, ge=0)
    decay_steps: float = Field(default=0.2, ge=0)
    decay: Literal["linear", "sqrt"] = "linear"
    initial_lr: float = Field(default=0.0, ge=0)
    min_lr: float | None = Field(default=None, ge=0, examples=[0])
    on_resume: Literal["keep", "stretch"] | None = Field(default=None, examples=["stretch"])

    @model_validator(mode="after")
    def _shares_fit_the_run(self) -> "ScheduleConfig":
        found = [
            f"schedule.{key}={value} is neither a number of steps nor a share below 1; use schedule.{key}=0.2"
            for key, value in (("warmup_steps", self.warmup_steps), ("decay_steps", self.decay_steps))
            if value > 1 and value % 1
        ]
        shares = max(self.warmup_steps, self.decay_steps) < 1
        if shares and (problem := self.problem_of_length(1_000_000, "the run")):
            found.append(problem)
        refuse(found)
        return self

    def resolved_warmup(self, total_steps: float) -> int:
        """Warmup steps of a run of ``total_steps``."""
        return _steps(self.warmup_steps, total_steps)

    def resolved_decay(self, total_steps: float) -> int:
        """Steps of ``warmup_stable_decay``'s decay in a run of ``total_steps``."""
        return _steps(self.decay_steps, total_steps)

    def problem_of_length(self, total_steps: float, length: str) -> str | None:
        """Why the curve does not fit into a run of ``total_steps``, which the user knows as ``length``."""
        parts = {"constant": (), "warmup_cosine": ("warmup_steps",)}.get(self.name, ("warmup_steps", "decay_steps"))
        if sum(_steps(getattr(self, key), total_steps) for key in parts) <= total_steps:
            return None
        asked = " and ".join(f"schedule.{key}={getattr(self, key):g}" for key in parts)
        return f"{asked} is more steps than {length}; use {' '.join(f'schedule.{key}=0.2' for key in parts)}"


def _steps(steps_or_share: float, total_steps: float) -> int:
    return int(steps_or_share * total_steps) if steps_or_share < 1 else int(steps_or_share)


class EvalConfig(Config):
    """When to evaluate, and over how much of each split.

    ``every_steps=None`` makes about :data:`EVALUATIONS` evaluations. ``max_tokens=None`` scores the whole validation
    split, or at most :data:`EVAL_SHARE` of the tokens that the run trains on (but at least :data:`EVAL_TOKENS`): a
    forward pass takes a third of a training step's operations, so all evaluations of both splits take below 5 % of the
    run. ``batches`` scores that many batches of each split instead, as the book does.
    """

    section: ClassVar[str] = "eval"

    every_steps: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    batches: int | None = Field(default=None, ge=1)

    def resolved_every_steps(self, total_steps: float, steps_per_epoch: int) -> int:
        """Optimizer steps between evaluations; an epoch where the run has no end."""
        if self.every_steps is not None:
            return self.every_steps
        return max(round(total_steps / EVALUATIONS), 1) if math.isfinite(total_steps) else steps_per_epoch

    def resolved_max_tokens(self, total_tokens: float) -> int:
        """The most tokens of each split that an evaluation scores, in a run that trains on ``total_tokens``."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(int(total_tokens * EVAL_SHARE), EVAL_TOKENS) if math.isfinite(total_tokens) else EVAL_TOKENS


class CheckpointConfig(Config):
    """When ``last.ckpt`` is written besides the end of the run: every so many steps, every so many minutes, or both;
    and whether the ranks of a sharded model write it in parts."""

    section: ClassVar[str] = "checkpoint"

    every_steps: int | None = Field(default=None, gt=0)
    every_minutes: float | None = Field(default=10.0, gt=0, examples=[None])
    in_parts: bool | None = None
