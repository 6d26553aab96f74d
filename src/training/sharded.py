"""A model whose weights are sharded over the ranks, and a whole copy of it."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn import functional as F

from src.model.architectures import build_model
from src.model.block import Block
from src.model.gpt import GPT
from src.training.strategy import FullyShardedStrategy


class GatheredLayerNorm(nn.LayerNorm):
    """Of a block that is gathered in bfloat16, while its input is in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def shard(net: GPT, mesh: DeviceMesh, precision: str) -> None:
    """Shard every parameter of ``net`` over the ranks of ``mesh``; a block's are gathered when it computes, in
    bfloat16 where ``precision`` computes in it.

    Weights on the meta device are drawn here, as :meth:`~src.model.gpt.GPT.init_weights` does: every rank draws all
    numbers, a block at a time, and keeps its own.
    """
    drawn = net.tok_emb.weight.is_meta
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for module in net.blocks.modules():
            if type(module) is nn.LayerNorm:
                module.__class__ = GatheredLayerNorm
    for part in (net.tok_emb, net.pos_emb, *net.blocks, net.final_norm, net.head):
        if drawn and not (net.config.tie_weights and part is net.head):
            part.to_empty(device="cpu")
            net.init_weights(part)
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    if net.config.tie_weights:
        net.head.weight = net.tok_emb.weight
    # The rest stays in float32: the sum of embeddings and blocks is kept in the type of the embeddings. The head's
    # weight is gathered by hidden_states and not given back before the backward pass.
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "hidden_states")


def whole_net(net: GPT, trainer: Trainer) -> GPT | None:
    """``net`` as rank 0 can use it without the other ranks; None on these where it is sharded, and on all where its
    checkpoints are in parts, because no host holds it whole. Every rank calls it."""
    if not isinstance(trainer.strategy, FullyShardedStrategy):
        return net
    if trainer.strategy.in_parts:
        return None
    weights = trainer.strategy.lightning_module_state_dict()  # empty but on rank 0
    if not trainer.is_global_zero:
        return None
    copy = build_model(net.config)
    copy.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
    return copy.to(trainer.strategy.root_device).train(net.training)
