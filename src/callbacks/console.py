"""Progress of a run on the terminal and in the log."""

from __future__ import annotations

import logging
import math
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.checkpoint.position import completes_step

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

REFRESH = 0.5  # seconds between updates of the bar, because reading a metric waits for the device


class Console(Callback):
    """Logs a line per evaluation, and shows a progress bar over the optimizer steps of the run or, without a bar, logs
    a line every ``every_seconds``. ``progress_bar=None`` shows a bar if stdout is a terminal."""

    def __init__(self, every_seconds: float = 20.0, progress_bar: bool | None = None) -> None:
        self.every_seconds = every_seconds
        self.progress_bar = progress_bar
        self._bar: Progress | None = None
        self._shown_at = 0.0
        self._started = 0.0
        self._first_step = 0
        self._total_steps = math.nan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._shown_at = time.monotonic()
        if trainer.is_global_zero and (sys.stdout.isatty() if self.progress_bar is None else self.progress_bar):
            self._bar = _started_bar()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        self._first_step = trainer.global_step
        self._total_steps = trainer.estimated_stepping_batches
        if self._bar is not None:
            total = self._total_steps if math.isfinite(self._total_steps) else None
            self._bar.add_task("step", total=total, completed=self._first_step, figures="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if completes_step(trainer, batch_idx) and self._due(trainer):
            self._show(trainer, self._figures(trainer))

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
            self._show(trainer, f"evaluating, batch {batch_idx + 1}/{batches}")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        if trainer.sanity_checking or "val/loss" not in metrics:
            return
        val = metrics["val/loss"].item()
        train = f", train {metrics['train/eval_loss'].item():.3f}" if "train/eval_loss" in metrics else ""
        tokens = f"{pl_module.evaluated_tokens['val']:,} tokens"
        log.info("%s: val loss %.3f (perplexity %s, %s)%s", self._at(trainer), val, perplexity(val), tokens, train)

    def _due(self, trainer: Trainer) -> bool:
        now = time.monotonic()
        if now - self._shown_at < (self.every_seconds if self._bar is None else REFRESH):
            return False
        self._shown_at = now
        return trainer.is_global_zero

    def _show(self, trainer: Trainer, figures: str) -> None:
        if self._bar is None:
            log.info("%s: %s", self._at(trainer), figures)
        else:
            task = self._bar.task_ids[0] if self._bar.task_ids else self._bar.add_task("step 0", total=None, figures="")
            self._bar.update(task, completed=trainer.global_step, figures=figures)

    def _figures(self, trainer: Trainer) -> str:
        keys = ("train/loss", "lr", "perf/tokens_per_second")
        loss, lr, rate = (float(trainer.callback_metrics.get(key, math.nan)) for key in keys)
        seconds = (time.monotonic() - self._started) / (trainer.global_step - self._first_step)
        seconds *= self._total_steps - trainer.global_step
        more = "" if self._bar is not None else f", perplexity {perplexity(loss)}, lr {lr:.2e}"
        speed = "" if math.isnan(rate) else f", {rate:,.0f} tokens/s"
        left = f", {timedelta(seconds=round(seconds))} left" if math.isfinite(seconds) else ""
        return f"loss {loss:.3f}{more}{speed}{left}"

    def _at(self, trainer: Trainer) -> str:
        total = f"/{self._total_steps}" if math.isfinite(self._total_steps) else ""
        return f"step {trainer.global_step}{total}"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _started_bar() -> Progress:
    """A bar that disappears at its end; lines that are printed meanwhile appear above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(None),
        TextColumn("{task.fields[figures]}"),
    )
    bar = Progress(*columns, transient=True, expand=True, refresh_per_second=4)
    bar.start()
    return bar


def perplexity(loss: float) -> str:
    """The perplexity of ``loss``, in a few digits."""
    return f"{math.exp(loss):,.1f}" if loss < 20 else f"{math.exp(min(loss, 709)):.1e}"
