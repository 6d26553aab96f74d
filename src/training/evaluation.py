"""When a run evaluates."""

import math
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.checkpoint.position import completes_step
from src.training.sections import EvalConfig

NEVER = sys.maxsize  # as a number of batches between validations


class EvaluationSchedule(Callback):
    """Validates after every so many optimizer steps, as ``config`` says, and after the last one.

    Lightning counts batches, which drifts from optimizer steps under accumulation, and skips the final weights where
    the run's length is not a multiple of the interval. The Trainer needs ``val_check_interval=NEVER`` and
    ``check_val_every_n_epoch=None``.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self._every_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        self._every_steps = self.config.resolved_every_steps(trainer.estimated_stepping_batches, steps_per_epoch)
        # A checkpoint written by the validation of a step continues after that validation. Lightning finds that out by
        # asking whether one is due.
        loop = trainer.fit_loop
        resumed_after_validation = loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_last
        trainer.val_check_batch = 1 if resumed_after_validation else trainer.val_check_batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self._every_steps == 0 or step >= trainer.estimated_stepping_batches
        trainer.val_check_batch = 1 if due and completes_step(trainer, batch_idx) else NEVER
