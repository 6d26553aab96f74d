"""How fast a run trains."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``perf/tokens_per_second``: tokens trained on per second of training since the last log.

    Evaluation, text samples and the writing of checkpoints stop the clock until the next batch.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._running_since: float | None = None
        self._logged = (0.0, 0)  # seconds and tokens at the last log
        self._tokens_before = 0
        self._step = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole run so far; None before its first logged step."""
        return self.tokens / self.seconds if self.seconds and self.tokens else None

    def _stop(self) -> None:
        if self._running_since is not None:
            self.seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def _start(self) -> None:
        self._running_since = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens_before = pl_module.tokens_seen
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._running_since is None:
            self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self.tokens = pl_module.tokens_seen - self._tokens_before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step  # not only accumulated
        self._step = trainer.global_step
        if not stepped or not trainer.log_every_n_steps or trainer.global_step % trainer.log_every_n_steps:
            return
        self._stop()
        self._start()
        self.tokens = pl_module.tokens_seen - self._tokens_before
        seconds, tokens = self._logged
        if self.seconds > seconds:
            self.log("perf/tokens_per_second", (self.tokens - tokens) / (self.seconds - seconds))
        self._logged = (self.seconds, self.tokens)
