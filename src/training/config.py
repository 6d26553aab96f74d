"""The numbers of a training run, and what makes them impossible."""

import math
from dataclasses import dataclass, field
from typing import Any

EVALUATIONS = 25
EVAL_SHARE, EVAL_TOKENS = 1 / 500, 4096
PRECISIONS = (None, "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", 16, 32, 64)


@dataclass(frozen=True)
class RunConfig:
    """The keys of ``conf/train.yaml`` itself."""

    seed: int = 123
    name: str = "gpt2"
    resume: str | None = None
    ckpt_path: str | None = None
    weights: str | None = None
    finite_guard: str = "stop"
    tokens_per_step: int | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    dry_run: bool = False
    kernels: str = "fast"

    def __post_init__(self) -> None:
        found = []
        if self.seed < 0:
            found.append(f"seed={self.seed} cannot be negative: seed=123")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            found.append(f"tokens_per_step={self.tokens_per_step} must be at least 1: tokens_per_step=524288")
        if self.kernels not in ("fast", "plain"):
            found.append(f"kernels={self.kernels} is not one of fast, plain; use kernels=fast")
        if self.finite_guard not in ("stop", "rollback"):
            found.append(f"finite_guard={self.finite_guard} is neither stop nor rollback: finite_guard=stop")
        for key in ("ckpt_path", "weights"):
            if (path := getattr(self, key)) and "://" in path:
                found.append(f"{key}={path} is an address, not a file: fetch it, then {key}=<the file>")
        if self.ckpt_path and self.weights:
            found.append("ckpt_path and weights exclude each other: weights=null to continue a run, or ckpt_path=null")
        if found:
            raise ValueError("\n".join(found))


@dataclass(frozen=True)
class OptimizerConfig:
    """``adamw`` (Loshchilov & Hutter 2019), or ``muon`` (Jordan et al. 2024) with ``momentum`` for the matrices of the
    blocks and AdamW for everything else. ``decay`` chooses what ``weight_decay`` pulls towards zero: ``matrices``
    (neither biases nor layer norms) or ``all``. ``fused=None`` picks AdamW's fused kernel where the device has one."""

    name: str = "adamw"
    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    decay: str = "matrices"
    fused: bool | None = None
    momentum: float = 0.95

    def __post_init__(self) -> None:
        found = []
        if self.name not in ("adamw", "muon"):
            found.append(f"optimizer.name={self.name} does not exist: optimizer=adamw or optimizer=muon")
        if not 0 <= self.momentum < 1:
            found.append(f"optimizer.momentum={self.momentum} must lie in [0, 1): optimizer.momentum=0.95")
        if not 0 < self.learning_rate < float("inf"):
            found.append(f"optimizer.learning_rate={self.learning_rate} must be above 0: optimizer.learning_rate=6e-4")
        if not 0 <= self.weight_decay < float("inf"):
            found.append(f"optimizer.weight_decay={self.weight_decay} cannot be negative: optimizer.weight_decay=0.1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optimizer.betas={list(self.betas)} must be two of [0, 1): 'optimizer.betas=[0.9,0.95]'")
        if not 0 < self.eps < 1:
            found.append(f"optimizer.eps={self.eps} must lie between 0 and 1: optimizer.eps=1e-8")
        if self.decay not in ("matrices", "all"):
            found.append(f"optimizer.decay={self.decay} is neither matrices nor all: optimizer.decay=matrices")
        if found:
            raise ValueError("\n".join(found))


@dataclass(frozen=True)
class ScheduleConfig:
    """``warmup_cosine``: linear from ``initial_lr`` to the optimizer's learning rate, then a half cosine to ``min_lr``
    (Loshchilov & Hutter 2017). ``warmup_stable_decay``: the same warmup, then the peak, and over the last
    ``decay_steps`` down to ``min_lr`` (Hu et al. 2024, section 4): ``linear``, or ``sqrt``, by 1 - sqrt(share of the
    decay) (Hägele et al. 2024). Steps below 1 are a share of the run, ``min_lr=None`` is a tenth of the peak.
    ``on_resume`` says what becomes of the curve of a run that is extended: ``keep`` it (and stay at its end) or
    ``stretch`` it over the new length. ``constant`` has no further numbers."""

    name: str = "constant"
    warmup_steps: float = 0.2
    decay_steps: float = 0.2
    decay: str = "linear"
    initial_lr: float = 0.0
    min_lr: float | None = None
    on_resume: str | None = None

    def __post_init__(self) -> None:
        found = []
        if self.on_resume not in (None, "keep", "stretch"):
            found.append(f"schedule.on_resume={self.on_resume} is neither keep nor stretch: schedule.on_resume=stretch")
        if self.name not in ("warmup_cosine", "warmup_stable_decay", "constant"):
            found.append(
                f"schedule.name={self.name} does not exist: schedule=warmup_cosine, schedule=warmup_stable_decay or "
                f"schedule=constant"
            )
        for key in ("warmup_steps", "decay_steps"):
            if (value := getattr(self, key)) < 0 or (value > 1 and value % 1):
                found.append(
                    f"schedule.{key}={value} is neither a number of steps nor a share below 1: schedule.{key}=0.2"
                )
        shares = max(self.warmup_steps, self.decay_steps) < 1
        if shares and (problem := self.problem_of_length(1_000_000, "the run")):
            found.append(problem)
        if self.decay not in ("linear", "sqrt"):
            found.append(f"schedule.decay={self.decay} is neither linear nor sqrt: schedule.decay=linear")
        for key in ("initial_lr", "min_lr"):
            if (getattr(self, key) or 0) < 0:
                found.append(f"schedule.{key}={getattr(self, key)} cannot be negative: schedule.{key}=0")
        if found:
            raise ValueError("\n".join(found))

    def resolved_warmup(self, total_steps: int) -> int:
        """Warmup steps of a run of ``total_steps``."""
        return _steps(self.warmup_steps, total_steps)

    def resolved_decay(self, total_steps: int) -> int:
        """Steps of ``warmup_stable_decay``'s decay in a run of ``total_steps``."""
        return _steps(self.decay_steps, total_steps)

    def problem_of_length(self, total_steps: int, length: str) -> str | None:
        """Why the curve does not fit into a run of ``total_steps``, which the user knows as ``length``."""
        parts = {"constant": (), "warmup_cosine": ("warmup_steps",)}.get(self.name, ("warmup_steps", "decay_steps"))
        if sum(_steps(getattr(self, key), total_steps) for key in parts) <= total_steps:
            return None
        asked = " and ".join(f"schedule.{key}={getattr(self, key):g}" for key in parts)
        return f"{asked} asks for more steps than {length}: {' '.join(f'schedule.{key}=0.2' for key in parts)}"


def _steps(steps_or_share: float, total_steps: int) -> int:
    return int(steps_or_share * total_steps) if steps_or_share < 1 else int(steps_or_share)


@dataclass(frozen=True)
class EvalConfig:
    """When to evaluate, and over how much of each split.

    ``every_steps=None`` makes about :data:`EVALUATIONS` of them. ``max_tokens=None`` scores the whole validation split,
    or, where that is less, :data:`EVAL_SHARE` of the tokens that the run trains on, but :data:`EVAL_TOKENS` at least:
    a forward pass takes a third of a training step's operations, so all evaluations of both splits take below 5 % of
    the run. ``batches`` scores so many batches of each split instead, as the book does.
    """

    every_steps: int | None = None
    max_tokens: int | None = None
    batches: int | None = None

    def __post_init__(self) -> None:
        found = [
            f"eval.{key}={getattr(self, key)} must be at least 1: eval.{key}=null"
            for key in ("every_steps", "max_tokens", "batches")
            if getattr(self, key) is not None and getattr(self, key) < 1
        ]
        if found:
            raise ValueError("\n".join(found))

    def resolved_every_steps(self, total_steps: float, steps_per_epoch: int) -> int:
        """Optimizer steps between evaluations; of a run without an end, an epoch."""
        if self.every_steps is not None:
            return self.every_steps
        return max(math.ceil(total_steps / EVALUATIONS), 1) if math.isfinite(total_steps) else steps_per_epoch

    def resolved_max_tokens(self, total_tokens: float) -> int:
        """The most tokens of each split that an evaluation scores, in a run that trains on ``total_tokens``."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(int(total_tokens * EVAL_SHARE), EVAL_TOKENS) if math.isfinite(total_tokens) else EVAL_TOKENS


@dataclass(frozen=True)
class CheckpointConfig:
    """When to write ``last.ckpt`` besides the end of the run: every so many steps, every so many minutes, or both."""

    every_steps: int | None = None
    every_minutes: float | None = 10.0

    def __post_init__(self) -> None:
        found = [
            f"checkpoint.{key}={getattr(self, key)} must be above 0, or null for never: checkpoint.{key}=null"
            for key in ("every_steps", "every_minutes")
            if getattr(self, key) is not None and getattr(self, key) <= 0
        ]
        if found:
            raise ValueError("\n".join(found))


@dataclass(frozen=True)
class TrainerLimits:
    """Those arguments of Lightning's Trainer whose values can be judged before Lightning is imported."""

    accelerator: str = "auto"
    precision: Any = None
    num_nodes: int = 1
    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    gradient_clip_algorithm: str | None = None
    log_every_n_steps: int = 1
    limit_train_batches: float | None = None
    limit_val_batches: Any = None
    overfit_batches: float = 0.0
    enable_checkpointing: bool = True

    def __post_init__(self) -> None:
        found = []
        for key, smallest, cure in (
            ("num_nodes", 1, 1),
            ("max_epochs", -1, 10),
            ("max_steps", -1, -1),
            ("accumulate_grad_batches", 1, 1),
            ("gradient_clip_val", 0, 1.0),
            ("log_every_n_steps", 0, 1),
            ("limit_train_batches", 0, "null"),
            ("overfit_batches", 0, 0.0),
        ):
            value = getattr(self, key)
            if value is not None and not value >= smallest:
                found.append(f"trainer.{key}={value} must be at least {smallest}: trainer.{key}={cure}")
        if self.limit_val_batches not in (None, 0) and repr(self.limit_val_batches) != "1.0":
            found.append(
                f"trainer.limit_val_batches={self.limit_val_batches} would evaluate the beginning of the split alone: "
                f"eval.max_tokens=<n> for windows spread over it, or trainer.limit_val_batches=0 for no evaluation"
            )
        for key in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(self, key) == 0:
                found.append(f"trainer.{key}=0 trains nothing: trainer.{key}=1, or dry_run=true to check a run")
        for key, allowed in (
            ("accelerator", ("auto", "cpu", "gpu", "cuda", "mps", "tpu")),
            ("gradient_clip_algorithm", (None, "norm", "value")),
            ("precision", PRECISIONS),
        ):
            if (value := getattr(self, key)) not in allowed:
                names = ", ".join("null" if choice is None else str(choice) for choice in allowed)
                found.append(f"trainer.{key}={value} is none of {names}: trainer.{key}={allowed[0] or 'null'}")
        if found:
            raise ValueError("\n".join(found))
