"""An exponential moving average of the weights, which evaluations and text samples use."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pydantic import Field
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.checkpoint.position import completes_step
from src.config import Config


class AveragingConfig(Config):
    section: ClassVar[str] = "callbacks.ema"

    decay: float = Field(default=0.999, ge=0, lt=1)


class ExponentialMovingAverage(Callback):
    """Averages the weights after every optimizer step, and puts the averages into the model while it is evaluated.
    Training and the ``state_dict`` of a checkpoint have the weights themselves.

    The decay at update n is ``min(decay, (1 + n) / (10 + n))``, as TensorFlow's ``tf.train.ExponentialMovingAverage``
    has it with ``num_updates``: the average forgets the first steps sooner. Weights of 16 bits are averaged in float32.

    Lightning's ``WeightAveraging`` copies the averages over the weights when training ends, before the last checkpoint
    is written.

    Raises:
        ValueError: a ``decay`` below 0, or of 1 or more.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.config = AveragingConfig(decay=decay)
        self.updates = 0
        self._averages: list[Tensor] = []  # in the order of the module's parameters
        self._weights: list[Tensor] | None = None  # while the model has the averages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = list(pl_module.parameters())
        self._averages = [
            before.detach().to(weight.device, torch.promote_types(weight.dtype, torch.float32), copy=True)
            for before, weight in zip(self._averages or weights, weights, strict=True)
        ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if completes_step(trainer, batch_idx):
            self.updates += 1
            update = get_ema_multi_avg_fn(min(self.config.decay, (1 + self.updates) / (10 + self.updates)))
            pairs = zip(pl_module.parameters(), self._averages, strict=True)
            update(self._averages, [weight.detach().to(average.dtype) for weight, average in pairs], self.updates)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.put_averages(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.put_weights_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.put_weights_back(pl_module)

    def put_averages(self, pl_module: LightningModule) -> bool:
        """Put the averages, if there are any, into ``pl_module``, and return whether that changed it."""
        if not self._averages or self._weights is not None:
            return False
        self._weights = [weight.detach().clone() for weight in pl_module.parameters()]
        _put(self._averages, pl_module)
        return True

    def put_weights_back(self, pl_module: LightningModule) -> None:
        if self._weights is not None:
            _put(self._weights, pl_module)
            self._weights = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._weights is not None:  # saved by another callback in the middle of an evaluation
            checkpoint["state_dict"] = _state_dict(pl_module, self._weights)
        if self._averages:
            checkpoint["averaging"] = {"updates": self.updates, "state_dict": _state_dict(pl_module, self._averages)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get("averaging", {"updates": 0, "state_dict": checkpoint["state_dict"]})
        self.updates = found["updates"]
        self._averages = [found["state_dict"][name] for name, _ in pl_module.named_parameters()]


@contextmanager
def averaged_weights(trainer: Any) -> Iterator[None]:
    """A context in which the model has its averaged weights, if the run averages them."""
    module = trainer.lightning_module
    averaging = [
        one for one in trainer.callbacks if isinstance(one, ExponentialMovingAverage) and one.put_averages(module)
    ]
    try:
        yield
    finally:
        for callback in averaging:
            callback.put_weights_back(module)


@torch.no_grad()
def _put(values: Sequence[Tensor], module: LightningModule) -> None:
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(value)  # kernels, optimizer and compiled code hold on to the parameter


def _state_dict(module: LightningModule, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The state dict of ``module`` with ``values`` as its parameters, the tied ones under each of their names."""
    value_of: dict[int, Any] = dict(zip(map(id, module.parameters()), values, strict=True))
    tensors = module.state_dict(keep_vars=True)
    return {name: value_of.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}
