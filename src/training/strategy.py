"""Training with weights, gradients and optimizer state sharded over the ranks (FSDP2)."""

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from src.checkpoint.find import read_checkpoint
from src.checkpoint.parts import load_parts, tensors_of
from src.checkpoint.parts_writer import save_parts, wait_for
from src.checkpoint.pickles import is_in_parts
from src.checkpoint.storage import refuse_non_finite
from src.memory import host_memory

log = logging.getLogger(__name__)

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullyShardedStrategy(ModelParallelStrategy):
    """PyTorch's ``fully_shard`` (Zhao et al. 2023, second edition) around each block and around the rest.

    Its checkpoints are those of a single device, in one file, written and read by the same plugin, or are written
    ``in_parts`` (:mod:`src.checkpoint.parts`), while training goes on: by default on several hosts, where the one file
    would take more than half of the memory of one. Either continues the other, with any number of ranks. Lightning's
    own number the optimizer's state by the order of the parameters in the model, which is not that of the optimizer
    where some parameters decay and others do not.
    """

    def __init__(self, world_size: int = 1, in_parts: bool | None = None) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self._asked = in_parts
        self._saving: tuple[Any, Path] | None = None  # under way

    @functools.cached_property
    def in_parts(self) -> bool:
        assert self.model is not None
        needed = 3 * sum(parameter.numel() * parameter.itemsize for parameter in self.model.parameters())
        large = self.num_nodes > 1 and needed > (host_memory() or math.inf) / 2  # all parts of one host take as much
        chosen = self.broadcast(large if self._asked is None else self._asked)
        if chosen:
            log.info("checkpoints in parts: text samples and tasks, which need the whole model, are left out")
        return chosen

    @functools.cached_property
    def _group(self) -> Any:
        return torch.distributed.new_group(backend="gloo")  # of its own: a thread saves while training goes on

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them over the ranks."""
        module: Any = self.lightning_module
        module.net.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.net.set_requires_gradient_sync(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return get_model_state_dict(self.model) if self.in_parts else super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._numbered(optimizer, None if self.in_parts else WHOLE)

    def _numbered(self, optimizer: Optimizer, options: StateDictOptions | None) -> dict[str, Any]:
        """The state of ``optimizer`` as its own ``state_dict`` has it; PyTorch's for sharded models is by name."""
        assert self.model is not None
        state: Any = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not state:  # on all ranks but 0 where it is whole
            return {}
        number = {name: place for place, name in enumerate(self._names(optimizer))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
        return {"state": {number[name]: moments for name, moments in state["state"].items()}, "param_groups": groups}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if not self.in_parts:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            return
        self.finish_saving()
        path, tensors = Path(filepath), tensors_of(checkpoint)
        own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
        refuse_non_finite(path, self.reduce_boolean_decision(all(bool(tensor.isfinite().all()) for tensor in own)))
        self._saving = save_parts(checkpoint, path, storage_options or (), self._group), path

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is complete; raises as :func:`wait_for`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            wait_for(*saving)

    def teardown(self) -> None:
        with suppress(Exception):  # of a run that has ended with an error; any other has waited
            self.finish_saving()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
        assert self.model is not None
        self.model.zero_grad()  # those of a step that failed would keep PyTorch from setting the optimizer up
        path = Path(checkpoint_path)
        if whole := not is_in_parts(path):
            checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        else:
            checkpoint = read_checkpoint(path, verify=False)  # by the rank that found it
            checkpoint["state_dict"] = get_model_state_dict(self.model)
            checkpoint["optimizer_states"] = [
                {**self._numbered(optimizer, None), "param_groups": kept["param_groups"]}
                for optimizer, kept in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            ]
            load_parts(path, tensors_of(checkpoint))  # each rank its own
        options = StateDictOptions(full_state_dict=whole)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, self._by_name(optimizer, state), options=options)
        return checkpoint

    def _by_name(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        names = self._names(optimizer)
        groups = [{**group, "params": [names[place] for place in group["params"]]} for group in state["param_groups"]]
        return {"state": {names[place]: moments for place, moments in state["state"].items()}, "param_groups": groups}

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of the parameters, in the order in which an optimizer's state numbers them."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
