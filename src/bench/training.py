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
    only_steps = config.trainer.changed(max_epochs=-1, max_steps=1_000_000, enable_checkpointing=False)
    never = config.eval.changed(every_steps=10_000_000)
    config = config.changed(trainer=only_steps, eval=never, tokens_per_parameter=None)
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
        accumulate=config.trainer.accumulate_grad_batches,
    )
    data.prepare_data()
    data.setup()
    return data


class Pacer(Callback):
    """Lets a Trainer make only the steps that are requested over ``connection``, and between them runs the bare loop,
    whose gradients are clipped to the norm ``clip``.

    A request is ``("trainer" | "bare", steps)``, answered with the seconds they took, or ``("phases", steps)``,
    answered with the seconds of the ``PHASES`` of each step. A step is an update after the Trainer's
    ``accumulate_grad_batches`` batches, forward and backward.
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
                self._left = steps * trainer.accumulate_grad_batches - 1
                synchronize(device)
                self._started = time.perf_counter()
                return
            started = time.perf_counter()
            phases = [self._step(trainer, pl_module, what == "phases") for _ in range(steps)]
            synchronize(device)
            self.connection.send(phases if what == "phases" else time.perf_counter() - started)
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.connection.send(peak_memory())

    def _step(self, trainer: Trainer, pl_module: Any, waiting: bool) -> dict[str, float]:
        """The seconds of each phase of a step, if ``waiting`` for the device after each."""
        net, device = pl_module.net, pl_module.device
        optimizer, accumulate = trainer.optimizers[0], trainer.accumulate_grad_batches
        seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        latest = time.perf_counter()

        def done(phase: str) -> None:
            nonlocal latest
            if waiting:
                synchronize(device.type)
                before, latest = latest, time.perf_counter()
                seconds[phase] += latest - before

        for _ in range(accumulate):
            inputs, targets = (tensor.to(device, non_blocking=True) for tensor in next(self.batches))
            done("data")
            with trainer.precision_plugin.forward_context():
                loss = pl_module.loss(inputs, targets) / accumulate
            done("forward")
            loss.backward()
            done("backward")
        torch.nn.utils.clip_grad_norm_(net.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad()
        done("optimizer")
        return seconds


def _endless(datamodule: TextDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from datamodule.train_dataloader()
