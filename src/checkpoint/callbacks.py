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
from src.files import link


class RunCheckpoints(Checkpoint):
    """Writes ``last.ckpt`` at the end of training, every so many optimizer steps or minutes, when interrupted, and
    after an evaluation with the lowest ``val/loss`` so far, when it becomes ``best.ckpt`` too: one file by two names.

    It is written when all of a step is over: its update, the logging of its loss, the evaluation and the texts due
    after it. Where several processes train, what one of them asks for, by its clock or for a signal, all do.
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
        self._best_due = False
        self._before: dict[str, float] = {}  # what the checkpoint says that this run continues
        self._step = self._saved_step = 0
        self._saved_at = 0.0
        self._between_steps = True  # and not between the batches that one step accumulates
        self._due = False
        self._stop = False
        self._group: torch.distributed.ProcessGroup | None = None

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")  # whose questions no GPU has to wait for
        if self._before.get("best_step") == trainer.global_step and self.path.exists() and trainer.is_global_zero:
            link(self.path, self.best_path)  # a run that was killed between the two names
        if self._before and self.best_path.exists():  # this folder's own: its loss is still to be beaten
            self.best, self.best_step = self._before["best"], self._before["best_step"]
        self._step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._between_steps = True
        self.interruption.deferred = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._between_steps:
            self._save_if_due(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between_steps = trainer.global_step != self._step
        self._step = trainer.global_step
        if self._between_steps:
            self._due |= self.every_steps is not None and self._step % self.every_steps == 0
            minutes = (time.monotonic() - self._saved_at) / 60
            self._due |= self.every_minutes is not None and minutes >= self.every_minutes
        # trainer.max_time may be over between two batches that one step accumulates: stop behind the step.
        self._stop |= trainer.should_stop
        trainer.should_stop = self._stop and self._between_steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and self._between_steps and loss is not None and loss < self.best:
            self.best, self.best_step = loss.item(), trainer.global_step
            self._best_due = self._due = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agree()
        if self._saved_step != self._step:
            self._save(trainer)
        self.interruption.deferred = False
        self.interruption.check()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.interruption.deferred = False

    def _save_if_due(self, trainer: Trainer) -> None:
        interrupted = self._agree()
        if self._due or (interrupted and self._saved_step != self._step):
            self._save(trainer)
        if interrupted:
            self.interruption.check()

    def _agree(self) -> bool:
        """Whether a process of the run was asked to stop; what comes in while they agree counts the next time."""
        asked = [int(self._due), int(self.interruption.requested or 0)]
        if self._group is not None:
            told = torch.tensor(asked)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self._group)
            asked = told.tolist()
        self._due = bool(asked[0])
        if asked[1]:
            self.interruption.requested = signal.Signals(asked[1])
        return bool(asked[1])

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)
            if self._best_due and trainer.is_global_zero:
                link(self.path, self.best_path)
        self._best_due = False
        self._saved_step = self._step
        self._saved_at = time.monotonic()
        self._due = False
