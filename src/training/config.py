"""The configuration of a training run as a whole, and the checks between its sections."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from src.config import Config, refuse
from src.data.config import DataConfig, TokenizerConfig
from src.model.config import GPTConfig
from src.training.sections import CheckpointConfig, EvalConfig, OptimizerConfig, ScheduleConfig

DEFAULT_EPOCHS = 10


class TrainerConfig(Config):
    """The arguments of Lightning's Trainer: those whose values can be checked before Lightning is imported, and any
    others, which Lightning checks."""

    section: ClassVar[str] = "trainer"
    model_config = ConfigDict(extra="allow")

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = Field(default="auto", examples=["ddp"])
    devices: Any = 1
    num_nodes: int = Field(default=1, ge=1)
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", 16, 32, 64] | None = None
    max_epochs: int | None = Field(default=None, ge=-1, examples=[10])
    max_steps: int = Field(default=-1, ge=-1)
    accumulate_grad_batches: int = Field(default=1, ge=1)
    gradient_clip_val: float | None = Field(default=1.0, ge=0)
    gradient_clip_algorithm: Literal["norm", "value"] | None = Field(default=None, examples=["norm"])
    log_every_n_steps: int = Field(default=1, ge=0)
    limit_train_batches: int | float | None = Field(default=None, ge=0)
    limit_val_batches: Any = None
    overfit_batches: int | float = Field(default=0.0, ge=0)
    val_check_interval: int | float | None = None
    check_val_every_n_epoch: int | None = None
    enable_checkpointing: bool = True
    enable_progress_bar: bool | None = None
    use_distributed_sampler: bool = False

    @model_validator(mode="after")
    def _something_is_trained_and_evaluated(self) -> "TrainerConfig":
        found = [
            f"trainer.{key}=0 trains nothing; use trainer.{key}=1, or dry_run=true to check a run"
            for key in ("max_epochs", "max_steps", "limit_train_batches")
            if getattr(self, key) == 0
        ]
        if self.limit_val_batches not in (None, 0) and repr(self.limit_val_batches) != "1.0":
            found.append(
                f"trainer.limit_val_batches={self.limit_val_batches} would evaluate only the beginning of the split; "
                f"use eval.max_tokens=<n> for windows spread over it, or trainer.limit_val_batches=0 for no evaluation"
            )
        refuse(found)
        return self

    @property
    def epochs(self) -> int | None:
        """``max_epochs``, or ten where neither epochs nor steps are limited."""
        return DEFAULT_EPOCHS if self.max_epochs is None and self.max_steps == -1 else self.max_epochs


def _as_switch(value: Any) -> Any:
    """``value``, with yes, no, on and off as booleans."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return value


class TrainConfig(Config):
    """Everything that ``python -m src.train`` composes. ``callbacks`` and ``logger`` hold nodes with a ``_target_``;
    keys that a user adds (``+tags=[a]``) are allowed and kept."""

    model_config = ConfigDict(extra="allow")

    seed: int = Field(default=123, ge=0)
    name: str = "gpt2"
    resume: str | None = None
    reproduce: str | None = None
    ckpt_path: str | None = None
    weights: str | None = None
    sweep: dict[str, str | None] = Field(default_factory=dict)
    skip_batches: tuple[int, ...] = ()
    tokens_per_step: int | None = Field(default=None, ge=1, examples=[524288])
    tokens_per_parameter: float | None = Field(default=None, gt=0, examples=[20])
    auto_batch: bool = Field(default=False, exclude=True)  # data.batch_size=auto, not yet a number
    kernels: Literal["fast", "plain"] = "fast"
    attention: Literal["auto", "flash"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    max_restarts: int = Field(default=0, ge=0)
    dry_run: Annotated[Literal[False, True, "measure"], BeforeValidator(_as_switch)] = False
    model: GPTConfig = GPTConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trainer: TrainerConfig = TrainerConfig()
    callbacks: dict[str, Any] = Field(default_factory=dict)
    logger: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _batch_size_may_be_auto(cls, values: dict[str, Any]) -> dict[str, Any]:
        data = values.get("data")
        if not (isinstance(data, dict) and data.get("batch_size") == "auto"):
            return values
        if not values.get("tokens_per_step"):  # otherwise the free memory would decide what a step is
            raise ValueError("data.batch_size=auto needs the tokens of a step; use tokens_per_step=<n>")
        return {**values, "auto_batch": True, "data": {**data, "batch_size": 1}}

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainConfig":
        refuse([*self._beginnings(), *self._nodes(), *self._lengths()])
        if not (self.weights or self.ckpt_path):  # which bring their own model
            known = self.data.format == "text"  # shards have a tokenizer of their own
            check_model(self.model, self.data, self.tokenizer.size if known else None)
        return self

    def _beginnings(self) -> list[str]:
        found = [
            f"{key}={path} is an address, not a file; download it, then use {key}=<the file>"
            for key, path in (("ckpt_path", self.ckpt_path), ("weights", self.weights))
            if path and "://" in path
        ]
        if self.ckpt_path and self.weights:
            found.append(
                f"ckpt_path={self.ckpt_path} and weights={self.weights} exclude each other; use weights=null to "
                f"continue a run, or ckpt_path=null"
            )
        return found

    def _nodes(self) -> list[str]:
        found = []
        if self.callbacks.get("ema") and self.trainer.strategy == "fsdp":
            found.append("callbacks=ema does not average sharded weights; use trainer=ddp, or ~callbacks.ema")
        if self.checkpoint.in_parts and self.trainer.strategy != "fsdp":
            found.append("checkpoint.in_parts=true is for sharded models; use trainer=fsdp or checkpoint.in_parts=null")
        return found + [
            f"{group}.{name}={node} has no _target_ to build; use ~{group}.{name}"
            for group in ("callbacks", "logger")
            for name, node in getattr(self, group).items()
            if node is not None and not (isinstance(node, dict) and "_target_" in node)
        ]

    def _lengths(self) -> list[str]:
        schedule, trainer, peak = self.schedule, self.trainer, self.optimizer.learning_rate
        if self.tokens_per_parameter and (trainer.max_steps, trainer.max_epochs) != (-1, None):
            return [
                f"tokens_per_parameter={self.tokens_per_parameter:g} is the length of the run; "
                f"use trainer.max_steps=-1 trainer.max_epochs=null, or tokens_per_parameter=null"
            ]
        if schedule.name == "constant":
            return []
        found = []
        if trainer.max_steps > 0:
            problem = schedule.problem_of_length(trainer.max_steps, f"trainer.max_steps={trainer.max_steps}")
            found += [problem] if problem else []
        if trainer.max_steps == trainer.max_epochs == -1:
            found.append(
                f"trainer.max_epochs=-1 leaves schedule={schedule.name} without an end; "
                f"use trainer.max_steps=<n> or schedule=constant"
            )
        found += [
            f"schedule.{key}={value} is above optimizer.learning_rate={peak}; use schedule.{key}=0"
            for key, value in (("initial_lr", schedule.initial_lr), ("min_lr", schedule.min_lr))
            if (value or 0) > peak
        ]
        return found

    def with_window(self) -> "TrainConfig":
        """A config in which ``data.context_length`` is that of the model where it was null."""
        return self.changed(data=self.data.changed(context_length=self.context_length))

    @property
    def context_length(self) -> int:
        """Tokens per window."""
        return self.data.context_length or self.model.context_length

    def with_batch_size(self, size: int) -> "TrainConfig":
        return self.changed(data=self.data.changed(batch_size=size), auto_batch=False)

    def accumulated(self, world_size: int) -> Self:
        """A config with the ``trainer.accumulate_grad_batches`` that makes ``tokens_per_step`` on ``world_size``
        devices.

        Raises:
            ValueError: no whole number does.
        """
        asked, given = self.tokens_per_step, self.trainer.accumulate_grad_batches
        if asked is None:
            return self
        batch = self.data.batch_size * self.context_length * world_size
        batches, left = divmod(asked, batch)
        if left:
            nearest = max(round(asked / batch), 1) * batch
            raise ValueError(
                f"tokens_per_step={asked} is not a multiple of the {batch} tokens of a batch (data.batch_size * "
                f"data.context_length * devices); use tokens_per_step={nearest}"
            )
        if given not in (1, batches):
            raise ValueError(
                f"trainer.accumulate_grad_batches={given} is not the {batches} that tokens_per_step={asked} needs; "
                f"use trainer.accumulate_grad_batches=1"
            )
        return self.changed(trainer=self.trainer.changed(accumulate_grad_batches=batches))

    def with_model_of(self, model: GPTConfig, source: str) -> "TrainConfig":
        """A config with the ``model`` of ``source`` (weights or a checkpoint), which keeps its own dropout.

        Raises:
            ValueError: a value of another model was asked for, that is, neither the default nor that of ``source``.
        """
        default, found, brought = GPTConfig(), [], {}
        for key in GPTConfig.model_fields:
            asked, value = getattr(self.model, key), getattr(model, key)
            if key in FREE:
                continue
            brought[key] = value
            if asked not in (value, getattr(default, key)) and not (key == "vocab_size" and asked == 0):
                found.append(
                    f"model.{key}={asked} differs from {value} in {source}, which brings its own model; leave out "
                    f"model, model.{key} and experiments that set it"
                )
        refuse(found)
        new = self.model.changed(**brought)
        data = self.data if self.data.context_length else self.data.changed(context_length=new.context_length)
        check_model(new, data, None, source)
        return self.changed(model=new, data=data)

    def with_vocabulary(self, n_vocab: int, multiple: int = 1) -> "TrainConfig":
        """A config whose model has a row for each of the ``n_vocab`` tokens of the tokenizer: where ``vocab_size`` was
        null, as many, rounded up to a ``multiple``.

        Raises:
            ValueError: ``vocab_size`` is less.
        """
        if self.model.vocab_size:
            check_model(self.model, self.data, n_vocab, self.weights or self.ckpt_path)
            return self
        return self.changed(model=self.model.changed(vocab_size=-(-n_vocab // multiple) * multiple))


FREE = ("drop_rate", "init")  # of the model: what a continued run may change


def check_model(model: GPTConfig, data: DataConfig, n_vocab: int | None = None, source: str | None = None) -> None:
    """Raise a ValueError where the windows of ``data``, or a tokenizer of ``n_vocab`` tokens, do not fit the model,
    which ``source`` may have brought."""
    found, longest = [], model.context_length
    if 0 < model.vocab_size < (n_vocab or 0):
        cure = f"weights=<a model of {n_vocab:,} tokens>" if source else "model.vocab_size=null"
        found.append(f"model.vocab_size={model.vocab_size} is less than the tokenizer's {n_vocab}; use {cure}")
    if (data.context_length or 1) > longest:
        cure = "" if source else f"model.context_length={data.context_length}, or "
        found.append(
            f"data.context_length={data.context_length} is more than the model's {longest}; "
            f"use {cure}data.context_length={longest}"
        )
    refuse(found)
