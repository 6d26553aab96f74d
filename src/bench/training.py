"""Our training step, timed in the Trainer with everything on and in a bare loop over the same model."""

import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from src.bench.config import BenchmarkConfig
from src.checkpoint.interruption import Interruption
from src.data.datamodule import TextDataModule
from src.device import synchronize
from src.memory import peak_memory
from src.training.trainer import build_module, build_trainer

PHASES = ("data", "forward", "backward", "optimizer")


def work(connection: Connection, config: BenchmarkConfig, built: Callable[..., list[Any]]) -> None:
    """A rival: our Trainer with the callbacks and loggers that ``built`` makes of the config's nodes and, between its
    steps, our bare loop. See :class:`Pacer` for its requests."""
    only_steps = config.trainer.changed(
        max_epochs=-1, max_steps=1_000_000, accumulate_grad_batches=1, enable_checkpointing=False
    )
    config = config.changed(trainer=only_steps, eval=config.eval.changed(every_steps=10_000_000))
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(config.seed, verbose=False)
        data = data_of(config)
        pacer = Pacer(connection, data, config.trainer.gradient_clip_val or float("inf"))
        callbacks, loggers = [*built(config.callbacks), pacer], built(config.logger, save_dir=folder)
        trainer = build_trainer(config, Path(folder), Interruption(), callbacks, loggers)
        trainer.fit(build_module(config, trainer.strategy.root_device.type), datamodule=data)


def data_of(config: BenchmarkConfig) -> TextDataModule:
    """The data module of ``config``, with its text read."""
    data = TextDataModule(
        tokenizer=config.tokenizer,
        **{**dict(config.data), "context_length": config.context_length, "seed": config.seed},
    )
    data.prepare_data()
    data.setup()
    return data


class Pacer(Callback):
    """Lets a Trainer make only the steps that are requested over ``connection``, and between them runs the bare loop,
    whose gradients are clipped to the norm ``clip``.

    A request is ``("trainer" | "bare", steps)``, answered with the seconds they took, or ``("phases", steps)``,
    answered with the start of each step and the moments at which its ``PHASES`` ended. A step is one batch, forward and
    backward, and an update.
    """

    def __init__(self, connection: Connection, datamodule: TextDataModule, clip: float) -> None:
        self.connection = connection
        self.batches = _endless(datamodule)
        self.clip = clip
        self._left = 0
        self._started: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.connection.send("ready")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._left:
            self._left -= 1
            return
        device = pl_module.device.type
        synchronize(device)
        if self._started is not None:
            self.connection.send(time.perf_counter() - self._started)
            self._started = None
        while (request := self.connection.recv()) is not None:
            what, steps = request
            if what == "trainer":
                self._left = steps - 1
                synchronize(device)
                self._started = time.perf_counter()
                return
            phases = [self._step(trainer, pl_module, what == "phases") for _ in range(steps)]
            synchronize(device)
            self.connection.send(phases if what == "phases" else time.perf_counter() - phases[0][0])
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.connection.send(peak_memory())

    def _step(self, trainer: Trainer, pl_module: Any, waiting: bool) -> list[float]:
        """The moments at which the phases of a step ended, after its start; ``waiting`` for the device at each."""
        net, device = pl_module.net, pl_module.device
        optimizer = trainer.optimizers[0]
        moments = [time.perf_counter()]

        def done() -> None:
            if waiting:
                synchronize(device.type)
                moments.append(time.perf_counter())

        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in next(self.batches))
        done()
        with trainer.precision_plugin.forward_context():
            loss = pl_module.loss(inputs, targets)
        done()
        loss.backward()
        done()
        torch.nn.utils.clip_grad_norm_(net.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad()
        done()
        return moments


def _endless(datamodule: TextDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from datamodule.train_dataloader()
