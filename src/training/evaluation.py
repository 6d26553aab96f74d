"""When a run evaluates."""

import math
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.training.config import EvalConfig

NEVER = sys.maxsize  # as a number of batches between validations


class EvaluationSchedule(Callback):
    """Validates after every so many optimizer steps, as ``config`` says, and after the last one.

    Lightning counts batches, which drifts from optimizer steps under accumulation, and skips the final weights where
    the run's length is no multiple of the interval. The trainer is to be built with ``val_check_interval=NEVER`` and
    ``check_val_every_n_epoch=None``.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self._every_steps = self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        self._every_steps = self.config.resolved_every_steps(trainer.estimated_stepping_batches, steps_per_epoch)
        # A checkpoint written by the validation of a step, best.ckpt, goes on behind that validation. Lightning looks
        # whether one is due to find that out.
        loop = trainer.fit_loop
        resumed_behind_validation = loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_last
        trainer.val_check_batch = 1 if resumed_behind_validation else trainer.val_check_batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, stepped = trainer.global_step, trainer.global_step != self._step
        self._step = step
        due = step % self._every_steps == 0 or step >= trainer.estimated_stepping_batches
        trainer.val_check_batch = 1 if stepped and due else NEVER
