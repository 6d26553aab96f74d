"""What a run says of itself: the start card, the hyperparameters, the summary."""

from __future__ import annotations

import errno
import functools
import logging
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from src.cli import app
from src.runs import processes
from src.cli.resume import as_typed, command_to_resume
from src.training.config import EvalConfig
from src.checkpoint.interruption import Interrupted

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from src.train import Run

log = logging.getLogger(__name__)

COMPARED = ("data.batch_size", "optimizer.name", "optimizer.learning_rate", "schedule.name", "seed")


def judge_initial_loss(loss: float, vocab_size: int) -> None:
    """A model that knows nothing yet is as good as a uniform guess: ln(vocab_size) nats per token."""
    guess = math.log(vocab_size)
    if abs(loss - guess) > 1:
        log.warning(
            "initial val loss %.3f is far from ln(vocab_size) = %.3f: look at the weights or the text", loss, guess
        )
    else:
        log.info("initial val loss %.3f, a uniform guess would be at ln(vocab_size) = %.3f", loss, guess)


def judge_best_loss(trainer: Trainer, before: float, after: float) -> None:
    """Training may have made a model worse than it was ``before``, at step 0, which no checkpoint holds."""
    from src.checkpoint.callbacks import RunCheckpoints

    best = (callback.best for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoints))
    if min([after, *best]) > before:
        log.warning(
            "no evaluation was better than that of step 0, val loss %.3f: optimizer.learning_rate=<less>", before
        )


def hyperparameters(cfg: DictConfig, record: dict[str, Any]) -> dict[str, Any]:
    """What a person compares between runs, by the names of the overrides: size, data, batch, learning rate, schedule
    and seed, and what else of the hyperparameters was asked for or differs from the default."""
    values, written, default = dict(_flat(record["config"])), _flat(OmegaConf.to_container(cfg)), _defaults()
    asked = {override.split("=")[0].lstrip("+") for override in record["overrides"]}
    sections = ("model.", "data.", "optimizer.", "schedule.", "trainer.", "weights", "ckpt_path")
    others = [
        key for key, value in written if key.startswith(sections) and (key in asked or default.get(key, value) != value)
    ]
    batch = cfg.data.batch_size * cfg.data.context_length * cfg.trainer.accumulate_grad_batches
    return {
        **{key: values[key] for key in (*COMPARED, *others)},
        "data.path": values["data.path"] or Path(values.get("data.url") or "story").name,
        "parameters": record["parameters"],
        "tokens_per_step": batch * processes.world_size(),
    }


@functools.cache
def _defaults() -> dict[str, Any]:
    return dict(_flat(OmegaConf.to_container(app.compose("train", []))))


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        elif prefix.split(".")[0] not in ("callbacks", "logger"):
            pairs.append((f"{prefix}{key}", value))
    return pairs


def print_start_card(run: Run, cfg: DictConfig, steps: float) -> None:
    record, trainer = run.record, run.trainer
    windows = cfg.data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
    length = cfg.data.context_length
    optimizer = {"adamw": "AdamW", "muon": "Muon for the matrices of the blocks, AdamW"}[cfg.optimizer.name]
    fused = "not fused" if cfg.optimizer.fused is False else "fused"
    data = run.datamodule.summary()
    interval = EvalConfig(**cfg.eval).resolved_every_steps(steps, run.datamodule.steps_per_epoch)
    evaluation = data.pop("evaluation")
    card = {
        "parameters": f"{record['parameters']:,}",
        **data,
        "step": f"{windows * length:,} tokens ({windows} windows of {length})",
        "steps": f"{steps:,}" if math.isfinite(steps) else "until stopped",
        "device": f"{trainer.world_size} x {record['device']}",
        "precision": record["precision"],
        "optimizer": f"{optimizer}, {fused}, {cfg.schedule.name} schedule",
        "evaluation": f"every {interval} steps, of {evaluation}",
        **({} if cfg.dry_run else {"run folder": str(run.folder)}),
    }
    for key, value in card.items():
        log.info("%-10s  %s", key, value)


def print_changes(before: dict[str, Any], config: dict[str, Any]) -> None:
    """What differs from the config that a continued run had when it was last started: overrides, or an edited YAML."""
    old = dict(_flat(before.get("config", {})))
    for key, value in _flat(config):
        if key not in ("resume", "dry_run") and old.get(key, value) != value:
            log.warning("changed: %s=%s, was %s", key, value, old[key])


def print_interrupted(interrupted: Interrupted, folder: Path) -> None:
    saved = any(folder.glob("checkpoints/*.ckpt"))
    log.warning("stopped by %s, %s", interrupted.signal.name, "saved" if saved else "before anything was saved")
    log.warning("to %s: %s", "continue" if saved else "begin again", command_to_resume(folder))
    interrupted.told = True


def explain(error: BaseException, cfg: DictConfig, folder: Path) -> str | None:
    """One line on what ran out or died and how to get on; None for any other error."""
    from src.device import is_out_of_memory

    message = str(error)
    resume = shlex.quote(f"resume={as_typed(folder)}") if (folder / "run.json").exists() else "the same command again"
    if processes.lost_peer(error):
        return f"another process of this run has died, often for want of memory: {resume}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or folder}): free some, then {resume}"
    if is_out_of_memory(error):
        batch, accumulate = cfg.data.batch_size, cfg.trainer.accumulate_grad_batches
        parts = next((n for n in range(2, batch + 1) if batch % n == 0), None)
        if parts:
            less = f"data.batch_size={batch // parts} trainer.accumulate_grad_batches={accumulate * parts}"
        else:
            less = (
                f"model.context_length={max(cfg.model.context_length // 2, 1)} "
                f"trainer.accumulate_grad_batches={accumulate * 2}"
            )
        if cfg.resume:  # whose batches are fixed
            return f"out of memory: {resume} with more of it, or weights=<its last.ckpt> {less} for a new run"
        return f"out of memory; this takes less and keeps the tokens per step: {less}"
    if "Caught ValueError in DataLoader worker" in message:  # as told there, without the traceback
        return message.strip().splitlines()[-1].removeprefix("ValueError: ")
    if "DataLoader worker" in message and ("exited unexpectedly" in message or "killed by signal" in message):
        fewer = f"data.num_workers={cfg.data.num_workers // 2}"
        return f"a data worker died, often for want of memory: {resume} {fewer}"
    return None


def print_summary(run: Run) -> None:
    record = run.record
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
    log.info("run folder: %s", run.folder)
