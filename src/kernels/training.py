"""Training in less time by ``torch.compile``, or in less memory by computing activations twice."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.model.block import Block
from src.model.cache import KVCache
from src.model.gpt import GPT


def compile_training(net: GPT, by_block: bool = False) -> None:
    """Let ``torch.compile`` compile the forward pass of training, in place; one graph for all blocks ``by_block``,
    between which a sharded model gathers weights.

    Names of parameters stay. Evaluation and decoding, whose shapes change, are not compiled.
    """
    for block in net.blocks if by_block else ():
        _extend(block, CompiledBlock)
    _extend(net, CompiledTraining)


def recompute_activations(net: GPT) -> None:
    """Keep only the input of each block for the backward pass, and compute the rest again (Chen et al. 2016)."""
    for block in net.blocks:
        _extend(block, RecomputedBlock)


class CompiledTraining(GPT):
    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        plain = super().hidden_states
        if cache is not None or not torch.is_grad_enabled() or isinstance(self.blocks[0], CompiledBlock):
            return plain(tokens, cache)
        return compiled(plain.__func__)(self, tokens)


class CompiledBlock(Block):
    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        plain = super().forward
        if cache is not None or not torch.is_grad_enabled():
            return plain(x, cache, layer)
        return compiled(plain.__func__)(self, x)


class RecomputedBlock(Block):
    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        if cache is not None or not self.training:
            return super().forward(x, cache, layer)
        return checkpoint(super().forward, x, use_reentrant=False)  # dropout draws the same numbers again


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(function)``, once per process."""
    return torch.compile(function)


def _extend(module: nn.Module, ability: type[nn.Module]) -> None:
    """Put ``ability`` before the class of ``module``, whatever subclass of the model's that is."""
    module.__class__ = _extended(ability, type(module))


@functools.cache  # one class for all blocks, or torch.compile would make a graph for each
def _extended(ability: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{ability.__name__}{kind.__name__}", (ability, kind), {})
