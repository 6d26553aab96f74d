"""The two checkpoints of a run: the best by validation loss, and the last."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


def best_checkpoint(folder: Path) -> ModelCheckpoint:
    """Keeps ``best.ckpt``, the checkpoint with the lowest ``val/loss``."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor="val/loss",
        save_on_train_epoch_end=False,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` at the end of training and, between, every so many optimizer steps or minutes."""

    def __init__(self, folder: Path, every_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.path = Path(folder, "last.ckpt")
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._step = 0
        self._saved_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # between two optimizer steps a checkpoint would lose gradients
            return
        self._step = trainer.global_step
        steps_due = self.every_steps is not None and self._step % self.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        minutes_due = self.every_minutes is not None and minutes >= self.every_minutes
        # Stopped within an epoch: once training has ended, Lightning counts that epoch as done.
        ends_here = trainer.should_stop or self._step >= trainer.estimated_stepping_batches
        cut_short = ends_here and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if trainer.strategy.broadcast(steps_due or minutes_due or cut_short):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()
