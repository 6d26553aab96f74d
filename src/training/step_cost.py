"""What a training step costs: memory, on tensors without data, and time, on random tokens."""

from __future__ import annotations

import statistics
import time
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from src.device import in_precision, seconds_of
from src.training.config import TrainConfig
from src.training.optim import build_optimizer
from src.training.trainer import build_module


class Memory(NamedTuple):
    """Bytes that a training step uses. Its parts are not all alive at the same time: ``peak`` is the largest sum of
    those that are. ``largest`` is the largest single tensor."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    largest: int
    peak: int


class StepTimes(NamedTuple):
    """Seconds of the forward and backward pass of a batch, of the rest of an optimizer step, and of the evaluation of a
    batch."""

    batch: float
    update: float
    evaluation: float


def estimate_memory(config: TrainConfig, device: str, precision: str) -> Memory:
    """The memory of a training step of ``config`` on one ``device``, without allocating it.

    The step runs on fake tensors, which have a shape and no data, with one and with two blocks; what the second one
    adds counts for each further block. It runs without ``compile``, which saves memory.
    """
    one, two = (_traced(config.changed(model=config.model.changed(n_layers=n)), device, precision) for n in (1, 2))
    more = config.model.n_layers - 1
    weights, gradients, optimizer, activations, *peaks = (
        first + (second - first) * more for first, second in zip(one[1:], two[1:], strict=True)
    )
    return Memory(weights, gradients, optimizer, activations, max(one[0], two[0]), max(peaks))


def _traced(config: TrainConfig, device: str, precision: str) -> list[int]:
    """Bytes of the largest tensor, of weights, gradients, optimizer and activations, and at the most during the forward
    pass, the backward pass and the update."""
    dtype, autocast = in_precision(precision, device)
    with torch.device("meta"):
        module = build_module(config.changed(compile=False), device).to(dtype)
    with FakeTensorMode(), LiveBytes() as live:
        made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones once
        for name, old in list(module.named_parameters(remove_duplicate=False)):
            new = made.setdefault(old, nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device=device)))
            owner, _, own_name = name.rpartition(".")
            setattr(module.get_submodule(owner), own_name, new)
        weights = live.now
        optimizer = build_optimizer(module.net, config.optimizer)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = live.now - weights
        optimizer.step()  # makes the optimizer's state
        state = live.now - weights - gradients
        if config.trainer.accumulate_grad_batches == 1:  # else gradients are there from the second batch on
            optimizer.zero_grad()
        kept = live.now
        tokens = torch.zeros(config.data.batch_size, config.context_length, dtype=torch.int64, device=device)
        peaks, losses = [], []
        with autocast:
            live.most = live.now
            losses.append(module.loss(tokens, tokens))
            peaks.append(live.most)
        activations = live.now - kept
        for act in losses.pop().backward, optimizer.step:
            live.most = live.now
            act()
            peaks.append(live.most)
    return [live.largest, weights, gradients, state, activations, *peaks]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and are still alive: ``now``, and at the ``most``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.largest = 0
        self._known = weakref.WeakSet()  # storages, which several tensors may share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
        self.largest = max(self.largest, size)


def measure_step(config: TrainConfig, device: torch.device, precision: str, seconds: float = 10) -> StepTimes:
    """The times of training steps on random tokens: medians over so many ``seconds``, but at least one step, after one
    that warms up and makes the optimizer's state. Afterwards this process has had all memory that training needs."""
    dtype, autocast = in_precision(precision, device.type)
    module = build_module(config, device.type).to(device, dtype)
    optimizer = build_optimizer(module.net, config.optimizer)
    shape = (config.data.batch_size, config.context_length)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)

    def batch() -> None:
        with autocast:
            loss = module.train().loss(tokens, tokens)
        loss.backward()

    def update() -> None:
        clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def evaluation() -> None:
        with torch.no_grad(), autocast:
            module.eval().loss(tokens, tokens, "sum")

    if config.trainer.accumulate_grad_batches > 1:
        batch()  # the next one finds its gradients
    rounds, started = [], time.perf_counter()
    while len(rounds) < 2 or time.perf_counter() - started < seconds:
        rounds.append([seconds_of(act, device.type) for act in (batch, update, evaluation)])
    return StepTimes(*map(statistics.median, zip(*rounds[1:], strict=True)))
