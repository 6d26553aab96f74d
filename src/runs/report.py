"""What a run prints: the start card, its judgement of the losses, the summary, and what went wrong."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.checkpoint.interruption import Interrupted
from src.runs import processes
from src.runs.slurm import requeue
from src.training.config import TrainConfig

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from src.data.datamodule import TextDataModule

log = logging.getLogger(__name__)

COMPARED = ("data.batch_size", "optimizer.name", "optimizer.learning_rate", "schedule.name", "seed")
HYPERPARAMETERS = ("model.", "data.", "optimizer.", "schedule.", "trainer.", "weights", "ckpt_path")


def print_start_card(
    config: TrainConfig,
    record: dict[str, Any],
    trainer: Trainer,
    data: TextDataModule,
    steps: float,
    plan: dict[str, str],
) -> None:
    """Print what the run is made of, and the lines of its ``plan``."""
    windows = data.windows_per_step
    length = config.context_length
    about = data.summary()
    intervals = {key: getattr(config.trainer, key) for key in ("val_check_interval", "check_val_every_n_epoch")}
    own = [f"by trainer.{key}={value}" for key, value in intervals.items() if value is not None]
    when = " ".join(own) or f"every {config.eval.resolved_every_steps(steps, data.steps_per_epoch)} steps"
    evaluation = f"{when}, of {about.pop('evaluation')}"
    card = {
        "parameters": f"{record['parameters']:,}",
        "text": data.config.source,
        **about,
        "step": f"{windows * length:,} tokens ({windows} windows of {length})",
        "steps": f"{steps:,}" if math.isfinite(steps) else "until stopped",
        "device": f"{trainer.world_size} x {record['device']}",
        "precision": record["precision"],
        "optimizer": f"{config.optimizer.name}, {config.schedule.name} schedule",
        "evaluation": "none" if config.trainer.limit_val_batches == 0 else evaluation,
        **plan,
        **({} if config.dry_run else {"run folder": trainer.default_root_dir}),
    }
    for key, value in card.items():
        log.info("%-10s  %s", key, value)


def judge_initial_loss(loss: float, vocab_size: int) -> None:
    """Compare the loss of an untrained model with a uniform guess, ln(vocab_size) nats per token."""
    guess = math.log(vocab_size)
    if abs(loss - guess) > 1:
        log.warning(
            "initial val loss %.3f is far from ln(vocab_size) = %.3f: check the weights or the text", loss, guess
        )
    else:
        log.info("initial val loss %.3f; a uniform guess has ln(vocab_size) = %.3f", loss, guess)


def judge_best_loss(before: float, best: float | None) -> None:
    """Warn where no evaluation was better than ``before``, the loss of step 0, which no checkpoint holds."""
    if best == before:
        log.warning(
            "no evaluation was better than that of step 0, val loss %.3f; use a lower optimizer.learning_rate", before
        )


def hyperparameters(config: TrainConfig, record: dict[str, Any], step_windows: int) -> dict[str, Any]:
    """What a person compares between runs, by the names of the overrides: size, data, batch, learning rate, schedule
    and seed, and each other hyperparameter that was set or differs from the default."""
    values, defaults = dict(flat(config.model_dump())), dict(flat(TrainConfig().model_dump()))
    if values["data.context_length"] == values["model.context_length"]:  # nothing to compare
        del values["data.context_length"]
    asked = {override.split("=")[0].lstrip("+") for override in record["overrides"]}
    others = [
        key
        for key, value in values.items()
        if key.startswith(HYPERPARAMETERS) and (key in asked or defaults.get(key, value) != value)
    ]
    return {
        **{key: values[key] for key in (*COMPARED, *others)},
        "data.path": config.data.path or Path(config.data.url or "story").name,
        "parameters": record["parameters"],
        "tokens_per_step": step_windows * config.context_length,
    }


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif prefix.split(".")[0] not in ("callbacks", "logger"):
            yield f"{prefix}{key}", value


def changes(before: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The values of ``config`` that were others in the record ``before``: overrides, or an edited YAML."""
    old = dict(flat(before.get("config", {})))
    return [
        f"{key}={value}, was {old[key]}"
        for key, value in flat(config)
        if key not in ("resume", "reproduce", "dry_run") and old.get(key, value) != value
    ]


def print_changes(before: dict[str, Any], config: dict[str, Any]) -> None:
    """What differs from the config that a resumed run had when it was last started."""
    for change in changes(before, config):
        log.warning("changed: %s", change)


def _print_interrupted(interrupted: Interrupted, folder: Path, command: str) -> None:
    saved = any(folder.glob("checkpoints/*.ckpt"))
    log.warning("stopped by %s, %s", interrupted.signal.name, "saved" if saved else "before anything was saved")
    log.warning("to %s: %s", "continue" if saved else "start again", command)
    interrupted.told = True


@contextmanager
def explained(config: TrainConfig, folder: Path, resume: str) -> Iterator[None]:
    """Turn what ran out or died in a run into a ValueError of one line, and report an interruption; ``resume`` is the
    override, quoted for a shell, that continues the run."""
    try:
        yield
    except Interrupted as interrupted:
        _print_interrupted(interrupted, folder, f"python -m src.train {resume}")
        if processes.rank() == 0:
            requeue(interrupted)
        raise
    except Exception as error:
        again = resume if (folder / "run.json").exists() else "the same command again"
        if line := _explanation(error, config, folder, again):
            raise ValueError(line) from error
        raise


def _explanation(error: Exception, config: TrainConfig, folder: Path, resume: str) -> str | None:
    from src.device import is_out_of_memory

    message = str(error)
    if processes.lost_peer(error):
        return f"another process of this run has died, often for lack of memory; use {resume}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or folder}); free some space, then use {resume}"
    if is_out_of_memory(error):
        if "; use " in message:  # of the plan, which knows better
            return f"out of memory: {message}"
        less, known = _less_memory(config), f": {message}" if message and isinstance(error, MemoryError) else ""
        if config.resume:  # whose batches cannot change
            return (
                f"out of memory{known}; use {resume} with more memory, or weights=<its last.ckpt> {less} for a new run"
            )
        return f"out of memory{known}; use {less} for less memory at the same number of tokens per step"
    if "Caught ValueError in DataLoader worker" in message:  # its message without its traceback
        return message.strip().splitlines()[-1].removeprefix("ValueError: ")
    if "DataLoader worker" in message and ("exited unexpectedly" in message or "killed by signal" in message):
        fewer = f"data.num_workers={config.data.num_workers // 2}"
        return f"a data worker died, often for lack of memory; use {resume} {fewer}"
    return None


def _less_memory(config: TrainConfig) -> str:
    batch, accumulate = config.data.batch_size, config.trainer.accumulate_grad_batches
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), None)
    length, factor = config.model.context_length, parts or 2
    less = f"data.batch_size={batch // parts}" if parts else f"model.context_length={max(length // 2, 1)}"
    # with tokens_per_step, which sets it, accumulation follows
    return less if config.tokens_per_step else f"{less} trainer.accumulate_grad_batches={accumulate * factor}"


def print_summary(record: dict[str, Any], folder: Path) -> None:
    if record["status"] == "checked":
        log.info("checked, nothing was trained and no run folder is kept")
        return
    if record["status"] == "completed":
        from src.callbacks.console import perplexity

        loss, val = "", record["val_loss"]
        if val is not None:
            loss = f", train loss {record['train_loss']:.3f}, val loss {val:.3f}, val perplexity {perplexity(val)}"
        rate = record["tokens_per_second"]
        speed = f", training at {rate:,.0f} tokens/s" if rate else ""
        steps, tokens = record["optimizer_steps"], record["tokens_seen"]
        log.info("%s steps, %s tokens%s, %.0f s in all%s", f"{steps:,}", f"{tokens:,}", speed, record["seconds"], loss)
    log.info("run folder: %s", folder)
