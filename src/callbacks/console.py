"""What a person sees while a run trains."""

import logging
import math
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class Console(Callback):
    """One line per evaluation; where no progress bar is drawn, also a line of progress every ``every_seconds``."""

    def __init__(self, every_seconds: float = 20.0) -> None:
        self.every_seconds = every_seconds
        self._last_line = 0.0
        self._started = 0.0
        self._first_step = self._step = 0
        self._total_steps = math.nan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._last_line = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        self._first_step = self._step = trainer.global_step
        self._total_steps = trainer.estimated_stepping_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step and self._due(trainer):
            self._print_progress(trainer)
        self._step = trainer.global_step

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._due(trainer):
            batches = trainer.num_val_batches[dataloader_idx] if trainer.num_val_batches else "?"
            log.info("%s, evaluating: batch %d/%s", self._at(trainer), batch_idx + 1, batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        if trainer.sanity_checking or "val/loss" not in metrics:
            return
        val = metrics["val/loss"].item()
        train = f"train {metrics['train/eval_loss'].item():.3f}, " if "train/eval_loss" in metrics else ""
        log.info("%s: loss in evaluation %sval %.3f, val perplexity %s", self._at(trainer), train, val, _exp(val))

    def _due(self, trainer: Trainer) -> bool:
        now = time.monotonic()
        if trainer.progress_bar_callback is not None or now - self._last_line < self.every_seconds:
            return False
        self._last_line = now
        return trainer.is_global_zero

    def _print_progress(self, trainer: Trainer) -> None:
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        loss, lr, rate = (metrics.get(key, math.nan) for key in ("train/loss", "lr", "perf/tokens_per_second"))
        seconds = (time.monotonic() - self._started) / (trainer.global_step - self._first_step)
        seconds *= self._total_steps - trainer.global_step
        left = f", {timedelta(seconds=round(seconds))} left" if math.isfinite(seconds) else ""
        speed = "" if math.isnan(rate) else f", {rate:,.0f} tokens/s"
        log.info("%s: loss %.3f, perplexity %s, lr %.2e%s%s", self._at(trainer), loss, _exp(loss), lr, speed, left)

    def _at(self, trainer: Trainer) -> str:
        total = f"/{self._total_steps}" if math.isfinite(self._total_steps) else ""
        return f"step {trainer.global_step}{total}"


def _exp(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 700 else "inf"
