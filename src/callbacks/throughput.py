"""The speed of training, and the share of the device's peak that it reaches."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from src.checkpoint.position import completes_step
from src.device import matrix_rate
from src.model.flops import flops_per_token, peak_flops


class Throughput(Callback):
    """Logs ``perf/tokens_per_second``, the tokens of all ranks per second of training since the last log, ``perf/mfu``,
    the model FLOPs utilization (Chowdhery et al. 2022, appendix B), and ``perf/seconds``, the seconds of training since
    the run's first step, over all processes of a resumed run.

    The peak of a GPU is the published one in bfloat16; that of a CPU is the rate of a matrix product, measured once.
    No ``perf/mfu`` is logged for other devices or precisions. The clock stops for evaluations, text samples and the
    writing of checkpoints. Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._seconds_before = 0.0  # of the processes that this run resumes
        self.tokens = 0
        self._running_since: float | None = None
        self._logged = (0.0, 0)  # seconds and tokens at the last log
        self._tokens_before = 0
        self._flops_per_token = 0
        self._peak: float | None = None  # of all devices

    @property
    def tokens_per_second(self) -> float | None:
        """The mean over the run so far; None before its first step."""
        return self.tokens / self.seconds if self.seconds and self.tokens else None

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self._seconds_before + self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._seconds_before = state_dict["seconds"]

    def _stop(self, trainer: Trainer) -> None:
        if self._running_since is not None:
            self.seconds += _clock(trainer) - self._running_since
            self._running_since = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._tokens_before = pl_module.tokens_seen
        peak = _peak(pl_module.device, str(trainer.precision))
        self._peak = peak and peak * trainer.world_size

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._flops_per_token = flops_per_token(pl_module.net.config, batch[0].shape[1])
        if self._running_since is None:
            self._running_since = _clock(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("perf/seconds", self._seconds_before + self.seconds)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop(trainer)
        self.tokens = pl_module.tokens_seen - self._tokens_before

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not completes_step(trainer, batch_idx):
            return
        self._stop(trainer)
        self._running_since = _clock(trainer)
        self.tokens = pl_module.tokens_seen - self._tokens_before
        every = trainer.log_every_n_steps
        if not every or trainer.global_step % every:
            return
        seconds, tokens = self._logged
        if self.seconds > seconds:
            rate = (self.tokens - tokens) / (self.seconds - seconds)
            pl_module.log("perf/tokens_per_second", rate)
            if self._peak:
                pl_module.log("perf/mfu", rate * self._flops_per_token / self._peak)
        pl_module.log("perf/seconds", self._seconds_before + self.seconds)
        self._logged = (self.seconds, self.tokens)


def _clock(trainer: Trainer) -> float:
    """Seconds without those spent on writing checkpoints, which can happen between any two hooks."""
    return time.perf_counter() - getattr(trainer.strategy.checkpoint_io, "seconds", 0.0)


def _peak(device: torch.device, precision: str) -> float | None:
    bf16 = precision.startswith("bf16")
    if device.type == "cpu":
        return matrix_rate("cpu", torch.bfloat16 if bf16 else torch.float32)
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" and bf16 else None
