"""How fast a run trains, and how much of the device that takes."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from src.device import matrix_rate
from src.model.flops import flops_per_token, peak_flops


class Throughput(Callback):
    """Logs ``perf/tokens_per_second``, tokens trained on per second of training since the last log, and ``perf/mfu``,
    the share of the devices' arithmetic that the model's own takes (Chowdhery et al. 2022, appendix B).

    That is their published peak in bfloat16, or, of a CPU, the rate of a matrix product measured once; none is logged
    for other devices or precisions. Evaluation, text samples and the writing of checkpoints stop the clock until the
    next batch; the device is never waited for.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._running_since: float | None = None
        self._logged = (0.0, 0)  # seconds and tokens at the last log
        self._tokens_before = 0
        self._step = 0
        self._flops_per_token = 0
        self._peak: float | None = None  # of all devices

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole run so far; None before its first logged step."""
        return self.tokens / self.seconds if self.seconds and self.tokens else None

    def _stop(self, trainer: Trainer) -> None:
        if self._running_since is not None:
            self.seconds += _clock(trainer) - self._running_since
            self._running_since = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens_before = pl_module.tokens_seen
        self._step = trainer.global_step
        peak = _peak(pl_module.device, str(trainer.precision))
        self._peak = peak and peak * trainer.world_size

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._flops_per_token = flops_per_token(pl_module.net.config, batch[0].shape[1])
        if self._running_since is None:
            self._running_since = _clock(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)
        self.tokens = pl_module.tokens_seen - self._tokens_before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step  # not only accumulated
        self._step = trainer.global_step
        if not stepped or not trainer.log_every_n_steps or trainer.global_step % trainer.log_every_n_steps:
            return
        self._stop(trainer)
        self._running_since = _clock(trainer)
        self.tokens = pl_module.tokens_seen - self._tokens_before
        seconds, tokens = self._logged
        if self.seconds > seconds:
            rate = (self.tokens - tokens) / (self.seconds - seconds)
            self.log("perf/tokens_per_second", rate)
            if self._peak:
                self.log("perf/mfu", rate * self._flops_per_token / self._peak)
        self._logged = (self.seconds, self.tokens)


def _clock(trainer: Trainer) -> float:
    """Seconds, of which those that went into checkpoints do not count: they are written between any two hooks."""
    return time.perf_counter() - getattr(trainer.strategy.checkpoint_io, "seconds", 0.0)


def _peak(device: torch.device, precision: str) -> float | None:
    bf16 = precision.startswith("bf16")
    if device.type == "cpu":
        return matrix_rate("cpu", torch.bfloat16 if bf16 else torch.float32)
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" and bf16 else None
