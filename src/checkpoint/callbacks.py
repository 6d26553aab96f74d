"""The checkpoints of a run: the best by validation loss, the last and the one before it."""

import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from src.checkpoint.interruption import Interruption
from src.checkpoint.position import completes_step
from src.files import link


class RunCheckpoints(Checkpoint):
    """Writes ``last.ckpt`` into ``folder``: at the end of training, every ``every_steps`` optimizer steps, every
    ``every_minutes`` minutes, on an interruption, and after an evaluation with the lowest ``val/loss`` so far. The file
    of such an evaluation gets the second name ``best.ckpt``.

    A checkpoint is written when a step is complete: its update, the logging of its loss, and the evaluation and text
    samples that follow it. All ranks save when one of them wants to, because of its clock or a signal.
    """

    def __init__(
        self,
        folder: Path,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.path = Path(folder, "last.ckpt")
        self.best_path = Path(folder, "best.ckpt")
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.interruption = interruption or Interruption()
        self.best, self.best_step = math.inf, -1  # the lowest val/loss so far
        self._resumed: dict[str, float] = {}  # best and best_step of the checkpoint that this run resumes
        self._saved_step = 0
        self._saved_at = 0.0
        self._between_steps = True  # and not between the batches of one step
        self._due = self._best_due = False
        self._stop = False
        self._group: Any = None  # torch.distributed.ProcessGroup

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._resumed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")  # agreeing on the CPU does not wait for a GPU
        if self._resumed.get("best_step") == trainer.global_step and self.path.exists() and trainer.is_global_zero:
            link(self.path, self.best_path)  # the run was killed after it wrote last.ckpt and before this name
        # without the file, this folder has no best one to beat
        if self._resumed and trainer.strategy.broadcast(self.best_path.exists()):
            self.best, self.best_step = self._resumed["best"], self._resumed["best_step"]
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._between_steps = True
        self.interruption.deferred = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._between_steps:
            self._save_if_due(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between_steps = completes_step(trainer, batch_idx)
        if self._between_steps:
            minutes = (time.monotonic() - self._saved_at) / 60
            self._due |= self.every_steps is not None and trainer.global_step % self.every_steps == 0
            self._due |= self.every_minutes is not None and minutes >= self.every_minutes
        # trainer.max_time may end between two batches of one step: stop after the step.
        self._stop |= trainer.should_stop
        trainer.should_stop = self._stop and self._between_steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and self._between_steps and loss is not None and loss < self.best:
            self.best, self.best_step = loss.item(), trainer.global_step
            self._best_due = self._due = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agree()
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._finish(trainer)
        self.interruption.deferred = False
        self.interruption.check()

    def _save_if_due(self, trainer: Trainer) -> None:
        interrupted = self._agree()
        if self._due or (interrupted and self._saved_step != trainer.global_step):
            self._save(trainer)
        if interrupted:
            self._finish(trainer)
            self.interruption.check()

    def _agree(self) -> bool:
        """Share among all ranks whether a checkpoint is due and which signal came; return whether one came. A signal
        that arrives meanwhile counts the next time."""
        due, signum = self._due, self.interruption.requested or 0
        if self._group is not None:
            shared = torch.tensor([due, signum], dtype=torch.int64)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, self._group)
            due, signum = shared.tolist()
        self._due = bool(due)
        if signum:
            self.interruption.requested = signal.Signals(signum)
        return bool(signum)

    def _finish(self, trainer: Any) -> None:
        if finish := getattr(trainer.strategy, "finish_saving", None):  # of a checkpoint that is written meanwhile
            finish()

    def _save(self, trainer: Any) -> None:
        if not trainer.fast_dev_run:
            # through SealedCheckpointIO in plugin.py
            trainer.save_checkpoint(self.path, storage_options=[self.best_path] if self._best_due else None)
        self._due = self._best_due = False
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
