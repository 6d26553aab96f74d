"""Swaps the layers of a model for faster ones.

The model does not know them: a layer gets another class and keeps its parameters, their names and its hooks.
"""

import torch
from torch import nn

from src.kernels.attention import FastAttention
from src.kernels.dropout import FastDropout
from src.kernels.memory import keep_freed_memory
from src.kernels.onednn import FastLinear, reorder
from src.model.attention import CausalSelfAttention
from src.model.gpt import GPT

FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    nn.Dropout: FastDropout,
    CausalSelfAttention: FastAttention,
}


def use_fast_kernels(net: GPT, device: str = "cpu") -> None:
    """Replace the plain operations of ``net`` by those that are faster on ``device``, in place.

    Only layers whose class is exactly a key of ``FAST`` are replaced; subclasses stay as they are. On a CPU the process
    also keeps the memory that it frees; see :func:`~src.kernels.memory.keep_freed_memory`.
    """
    for module in net.modules():
        module.__class__ = FAST.get(type(module), type(module))
    if device == "cpu":
        keep_freed_memory()


def can_fuse_loss(net: GPT) -> bool:
    """Whether :func:`~src.kernels.loss.fused_loss` can stand in for ``net.forward`` and cross-entropy: ``forward`` is
    GPT's own and the head is a :class:`FastLinear` without bias."""
    return type(net).forward is GPT.forward and isinstance(net.head, FastLinear) and net.head.bias is None


def pack_for_decoding(net: GPT) -> None:
    """Put the weights of ``net`` in the order that a CPU reads fastest, in place. It can then only generate, not train.

    In float32 that order gains nothing, and the weights stay as they are.
    """
    for module in net.modules():
        if type(module) is nn.Linear or type(module) is FastLinear:
            module.__class__ = FastLinear
            if module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16:
                reorder(module)
