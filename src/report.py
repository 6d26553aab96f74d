"""What a run says of itself: the start card, the hyperparameters, the summary."""

from __future__ import annotations

import errno
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.processes import lost_peer
from src.resume import command_to_resume
from src.training.config import EvalConfig
from src.training.interruption import Interrupted

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from src.train import Run

log = logging.getLogger(__name__)


def judge_initial_loss(loss: float, vocab_size: int) -> None:
    """A model that knows nothing yet is as good as a uniform guess: ln(vocab_size) nats per token."""
    guess = math.log(vocab_size)
    if abs(loss - guess) > 1:
        log.warning(
            "initial val loss %.3f is far from ln(vocab_size) = %.3f: look at the weights or the text", loss, guess
        )
    else:
        log.info("initial val loss %.3f, a uniform guess would be at ln(vocab_size) = %.3f", loss, guess)


def log_hyperparameters(trainer: Trainer, config: dict[str, Any]) -> None:
    """The flat config for TensorBoard's HParams, whose metrics are the curves of val/loss and val/perplexity."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.tensorboard.summary import hparams

    values = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in _flat(config)}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            for summary in hparams(values, {"val/loss": 0.0, "val/perplexity": 0.0}):
                logger.experiment.file_writer.add_summary(summary)


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
        "run folder": str(run.folder),
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
    from src.training.device import is_out_of_memory

    message = str(error)
    if lost_peer(error):
        return f"another process of this run has died, often for want of memory: resume={folder}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or folder}): free some, then resume={folder}"
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
            return f"out of memory: resume={folder} with more of it, or weights=<its last.ckpt> {less} for a new run"
        return f"out of memory; this takes less and keeps the tokens per step: {less}"
    if "Caught ValueError in DataLoader worker" in message:  # as told there, without the traceback
        return message.strip().splitlines()[-1].removeprefix("ValueError: ")
    if "DataLoader worker" in message and ("exited unexpectedly" in message or "killed by signal" in message):
        fewer = f"data.num_workers={cfg.data.num_workers // 2}"
        return f"a data worker died, often for want of memory: resume={folder} {fewer}"
    return None


def print_summary(run: Run) -> None:
    record = run.record
    if record["status"] == "completed":
        loss = (
            ""
            if record["val_loss"] is None
            else (
                f", train loss {record['train_loss']:.3f}, val loss {record['val_loss']:.3f}, "
                f"val perplexity {record['val_perplexity']:,.1f}"
            )
        )
        rate = record["tokens_per_second"]
        speed = f" at {rate:,.0f} tokens/s" if rate else ""
        steps, tokens = record["optimizer_steps"], record["tokens_seen"]
        log.info("%s steps, %s tokens%s in %.0f s%s", f"{steps:,}", f"{tokens:,}", speed, record["seconds"], loss)
    log.info("run folder: %s", run.folder)
