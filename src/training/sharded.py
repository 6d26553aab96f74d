"""Training with weights, gradients and optimizer state sharded over the ranks (FSDP2)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from src.model.architectures import build_model
from src.model.gpt import GPT

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullyShardedStrategy(ModelParallelStrategy):
    """PyTorch's ``fully_shard`` (Zhao et al. 2023, second edition) around each block and around the rest.

    Its checkpoints are those of a single device, in one file, written and read by the same plugin, so either can
    continue the other. Lightning's own number the optimizer's state by the order of the parameters in the model, which
    is not that of the optimizer where some parameters decay and others do not.
    """

    def __init__(self, world_size: int = 1) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        state: Any = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)  # by name; empty but on rank 0
        if not self.is_global_zero:
            return {}
        number = {name: place for place, name in enumerate(self._names(optimizer))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
        return {"state": {number[name]: moments for name, moments in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True))
        self.model.zero_grad()  # those of a step that failed would keep PyTorch from setting the optimizer up
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(
                self.model, optimizer, self._by_name(optimizer, state), options=StateDictOptions(full_state_dict=True)
            )
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


def shard(net: GPT, mesh: DeviceMesh) -> None:
    """Shard every parameter of ``net`` over the ranks of ``mesh``; a block's are gathered when it computes."""
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "hidden_states")


def whole_net(net: GPT, trainer: Trainer) -> GPT | None:
    """``net`` as rank 0 can use it without the other ranks; None on these where it is sharded. Every rank calls it."""
    if not isinstance(trainer.strategy, FullyShardedStrategy):
        return net
    weights = trainer.strategy.lightning_module_state_dict()  # empty but on rank 0
    if not trainer.is_global_zero:
        return None
    copy = build_model(net.config)
    copy.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
    return copy.to(trainer.strategy.root_device).train(net.training)
