"""Where a run starts: from scratch, from weights, or from a checkpoint that its configuration may continue."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.checkpoint.find import good_checkpoint, newest_good_checkpoint, read_checkpoint
from src.config import refuse
from src.data.config import TokenizerConfig
from src.data.tokenizers import describes
from src.files import link
from src.interop.names import assign
from src.interop.weights import read_model, tokenizer_in
from src.model.config import GPTConfig
from src.runs import processes
from src.runs.batch_size import vocabulary_multiple, with_batches
from src.runs.record import read_record
from src.training.config import FREE, TrainConfig
from src.training.optim import learning_rate_at

if TYPE_CHECKING:
    import tiktoken
    from torch import Tensor

    from src.data.datamodule import TextDataModule
    from src.training.module import PretrainingModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from. ``config`` is the run's, with the model of its weights or checkpoint and with
    ``tokens_per_step`` turned into accumulated batches; ``path`` is the checkpoint that is continued. None of ``path``,
    ``weights`` and ``tokenizer`` is set from scratch."""

    config: TrainConfig
    path: Path | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] | None = None
    tokenizer: tiktoken.Encoding | None = None  # of the weights or the checkpoint

    @property
    def step(self) -> int:
        return self.checkpoint.get("global_step", 0)

    def skip_batches(self, batch_windows: int) -> tuple[int, ...]:
        """The batches to leave out, of ``batch_windows`` windows each: those of the config and those that the run has
        left out before, in batches of another size where it ran on another number of devices."""
        before = self.checkpoint.get("batch_windows", batch_windows)
        skipped = {*self.checkpoint.get("skipped_batches", []), *self.config.skip_batches}
        windows = (window for batch in skipped for window in range(batch * before, (batch + 1) * before))
        return tuple(sorted({window // batch_windows for window in windows}))

    def check(self, data: TextDataModule, batches: int, steps: float, finished: bool) -> None:
        """Refuse data other than that of the checkpoint, epochs of another number of windows (``batches`` batches), and
        a run of ``steps`` steps with nothing left to do, unless it only has to end: ``finished`` says that the
        checkpoint belongs to a completed run or to another run.

        Raises:
            ValueError: for any of these.
        """
        if self.path is None:
            return
        before, now = self.checkpoint.get("fixed_values", {}), data.fixed_values()
        key = "data_sha256"
        if before.get(key, now[key]) != now[key]:
            raise ValueError(
                f"data.path={data.config.source} has another text than {self.path} was trained on ({key} "
                f"{now[key][:12]}, was {before[key][:12]}); use data.path=<that text>, or weights={self.path} for "
                f"a new run on this one"
            )
        windows = batches * data.windows_per_batch
        if (expected := self.checkpoint.get("epoch_windows", windows)) != windows:
            batch = self.checkpoint["batch_windows"]
            raise ValueError(
                f"an epoch would have {windows:,} windows, in {self.path} it has {expected:,}, in batches of {batch}; "
                f"use trainer.devices x data.batch_size = {batch}, or weights={self.path} for a new run"
            )
        if self.step >= steps and finished:
            raise ValueError(
                f"{self.path} is at step {self.step} of {steps:,}, there is nothing left to do; "
                f"use trainer.max_epochs=<more> or trainer.max_steps=<more>"
            )

    def with_vocabulary(self, data: TextDataModule, device: str) -> Start:
        """A start whose model has the tokenizer's number of tokens, on a GPU rounded up to a multiple of 64."""
        config = self.config.with_vocabulary(data.tokenizer.n_vocab, vocabulary_multiple(device))
        return replace(self, config=config)

    def load_weights(self, module: PretrainingModule) -> None:
        """Give ``module`` the weights that the run starts from; a checkpoint is restored by the Trainer."""
        if self.weights is not None and module.net.tok_emb.weight.is_meta:  # to be sharded
            assign(module.net, self.weights)
        elif self.weights is not None:
            module.net.load_state_dict(self.weights)

    def take_over(self, folder: Path) -> None:
        """Make the checkpoint that is continued the ``last.ckpt`` of its run, in ``folder``."""
        last = folder / "checkpoints" / "last.ckpt"
        if self.path and self.path.parent == last.parent and self.path != last and processes.rank() == 0:
            link(self.path, last)

    def schedule_steps(self, steps: float) -> float:
        """The optimizer steps over which the learning rate's curve is laid out, in a run of ``steps`` steps.

        Raises:
            ValueError: the run that is continued had another length, and ``schedule.on_resume`` is not set.
        """
        schedule, peak = self.config.schedule, self.config.optimizer.learning_rate
        before = self.checkpoint.get("schedule_steps", steps)
        if schedule.name == "constant" or before == steps or schedule.on_resume == "stretch":
            return steps
        if schedule.on_resume == "keep":
            return before
        now, last, stretched = (
            f"{learning_rate_at(step, total, peak, schedule):.2e}"
            for step, total in ((self.step, before), (before, before), (self.step, steps))
        )
        raise ValueError(
            f"the learning rate was laid out over {before:,} steps, the run is to make {steps:,}; use "
            f"schedule.on_resume=keep (it continues at {now} and stays at {last} from step {before:,}) or "
            f"schedule.on_resume=stretch (it continues at {stretched}, on a curve of {steps:,} steps)"
        )


def find_start(config: TrainConfig, folder: Path) -> Start:
    """What the run in ``folder`` starts from; on rank 0 the file is chosen, on the others it is the same.

    Raises:
        ValueError: a checkpoint or weights that cannot be read, or that ``config`` cannot continue.
    """
    world_size = processes.world_size()
    found = _shared(lambda: _checkpoint(config, folder))
    if found is None:
        if not config.weights:
            return Start(with_batches(config, world_size))
        model, weights, tokenizer, _ = read_model(config.weights)
        _check_tokenizer(config.tokenizer, tokenizer, config.weights)
        config = with_batches(config.with_model_of(model, config.weights), world_size)
        return Start(config, weights=weights, tokenizer=tokenizer)
    path, checkpoint = found
    if config.trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches={config.trainer.overfit_batches} is a check that cannot be continued; "
            f"use trainer.overfit_batches=0"
        )
    model = GPTConfig(**checkpoint["hyper_parameters"]["model"])
    tokenizer = tokenizer_in(checkpoint)
    before = read_record(folder).get("config", {}).get("tokenizer") if config.resume else None
    _check_tokenizer(config.tokenizer, tokenizer, str(path), before)
    if config.weights or config.ckpt_path:
        config = config.with_model_of(model, str(path))
    elif not config.model.vocab_size:
        config = config.with_vocabulary(model.vocab_size)
    if config.auto_batch:
        config = config.with_batch_size(checkpoint.get("fixed_values", {}).get("data.batch_size", 1))
    config = with_batches(config, world_size)
    found = [*_other_model(config, model, path), *_other_optimizer(config, checkpoint, path)]
    refuse([*found, *_other_values(config, checkpoint, path, world_size)])
    return Start(config, path, checkpoint, tokenizer=tokenizer)


def _checkpoint(config: TrainConfig, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    if config.resume:
        found = newest_good_checkpoint(folder / "checkpoints")
        if found is None and any(folder.glob("checkpoints/*.ckpt")):
            raise ValueError(
                f"resume={config.resume} has no checkpoint that can be read; use hydra.run.dir=<a new folder>"
            )
        if found is not None:
            return found
        log.info("%s has no checkpoint yet: starting it again", folder)
    return good_checkpoint(Path(config.ckpt_path)) if config.ckpt_path else None


def _shared(look: Callable[[], tuple[Path, dict[str, Any]] | None]) -> tuple[Path, dict[str, Any]] | None:
    """What ``look`` finds on rank 0, on every rank."""
    looked = []
    path = processes.from_rank_zero(lambda: looked.append(look()) or (looked[0] and str(looked[0][0])))
    if looked:
        return looked[0]
    return (Path(path), read_checkpoint(Path(path), verify=False)) if path else None


def _check_tokenizer(
    asked: TokenizerConfig, own: tiktoken.Encoding, source: str, before: dict[str, Any] | None = None
) -> None:
    """Refuse a tokenizer other than that of ``source``, its ``own``. GPT-2's, the default, gives way, unless the run
    that is continued had asked for another one ``before``."""
    if asked.model_dump() == before if before else asked == TokenizerConfig() or describes(asked, own):
        return
    kind = own.name.split("-")[0]
    cure = {"name": kind, "vocab_size": own.n_vocab if kind == "bpe" else None, **(before or {})}
    others = (f" tokenizer.{key}={value}" for key, value in cure.items() if value is not None and key != "name")
    raise ValueError(
        f"tokenizer={asked.name} differs from {own.name} in {source}, which brings its own; "
        f"use tokenizer={cure['name']}{''.join(others)}"
    )


def _other_model(config: TrainConfig, model: GPTConfig, path: Path) -> list[str]:
    return [
        f"model.{key}={getattr(config.model, key)} differs from {value} in {path}; use model.{key}={value}"
        for key, value in model
        if key not in FREE and getattr(config.model, key) != value
    ]


def _other_optimizer(config: TrainConfig, checkpoint: dict[str, Any], path: Path) -> list[str]:
    before = checkpoint["hyper_parameters"]["optimizer"].get("name", "adamw")
    if config.optimizer.name == before:
        return []
    return [
        f"optimizer={config.optimizer.name} differs from {before} in {path}, whose state it cannot use; "
        f"use optimizer={before}, or weights={path} for a new run"
    ]


def _other_values(config: TrainConfig, checkpoint: dict[str, Any], path: Path, devices: int) -> list[str]:
    """How the data or the windows of a step differ from those of the checkpoint at ``path``, a line each."""
    before = {"data.shift": False, **checkpoint.get("fixed_values", {})}  # which earlier versions did not have
    devices_before = checkpoint.get("processes", 1)
    now = _values(config)
    batch = ("data.batch_size", "trainer.accumulate_grad_batches")
    step = math.prod(now[key] for key in batch) * devices  # windows
    step_before = math.prod(before.get(key, now[key]) for key in batch) * devices_before
    if step != step_before and devices != devices_before:
        accumulate, rest = divmod(step_before, devices * config.data.batch_size)
        cure = f"trainer.devices={devices_before}" if rest else f"trainer.accumulate_grad_batches={accumulate}"
        return [
            f"a step of {step} windows on {devices} devices differs from the {step_before} on {devices_before} in "
            f"{path}; use {cure}, or weights={path} for a new run"
        ]
    return [
        f"{key}={now[key]} differs from {value} in {path}; use {key}={value}, or weights={path} for a new run"
        for key, value in before.items()
        if key in now and now[key] != value and not (step == step_before and key in batch)
    ]


def _values(config: TrainConfig) -> dict[str, Any]:
    """The values of ``config`` that a continued run cannot change, by the names of the overrides; the text and the
    tokenizer are compared once they are read."""
    trainer = config.trainer
    return {
        **config.data.fixed_values(config.context_length),
        "seed": config.seed,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.limit_train_batches": 1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches,
    }
