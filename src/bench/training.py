"""Our own training step, by the Trainer with everything on and by a bare loop over the same model."""

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from src.bench.rivals import peak_memory
from src.data.datamodule import TextDataModule
from src.device import synchronise

PHASES = ("data", "forward", "backward", "optimizer")


class Pacer(Callback):
    """Lets a Trainer make only the steps that are asked for over ``connection``, and between them the bare loop.

    A request is ``("trainer" | "bare", steps)``, answered by the seconds they took, or ``("phases", steps)``, answered
    by a list of the seconds of each of ``PHASES`` per step. A step is one batch, forwards and backwards, and an update.
    """

    def __init__(self, connection: Connection, datamodule: TextDataModule) -> None:
        self.connection = connection
        self.batches = _endless(datamodule)
        self._left = 0
        self._started: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.connection.send("ready")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._left:
            self._left -= 1
            return
        device = pl_module.device.type
        synchronise(device)
        if self._started is not None:
            self.connection.send(time.perf_counter() - self._started)
            self._started = None
        while (request := self.connection.recv()) is not None:
            what, steps = request
            if what == "trainer":
                self._left = steps - 1
                synchronise(device)
                self._started = time.perf_counter()
                return
            phases = [self._step(trainer, pl_module, what == "phases") for _ in range(steps)]
            synchronise(device)
            self.connection.send(phases if what == "phases" else time.perf_counter() - phases[0][0])
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.connection.send(peak_memory())

    def _step(self, trainer: Trainer, pl_module: LightningModule, waiting: bool) -> list[float]:
        """The moments at which the phases of a step ended, the first its beginning; ``waiting`` for the device."""
        net, device = pl_module.net, pl_module.device
        optimizer = trainer.optimizers[0]
        moments = [time.perf_counter()]

        def done() -> None:
            if waiting:
                synchronise(device.type)
                moments.append(time.perf_counter())

        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in next(self.batches))
        done()
        with trainer.precision_plugin.forward_context():
            loss = pl_module.loss(inputs, targets)
        done()
        loss.backward()
        done()
        torch.nn.utils.clip_grad_norm_(net.parameters(), trainer.gradient_clip_val or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        done()
        return moments


def _endless(datamodule: TextDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from datamodule.train_dataloader()
