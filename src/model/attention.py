"""Causal multi-head self-attention (Vaswani et al. 2017) on the fastest kernels that the device has for it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.model.cache import KVCache
from src.model.config import GPTConfig
from src.model.dropout import dropout
from src.model.linear import Linear


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads)  # (B, T, 3, H, D)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        mask = None
        if cache is not None:
            mask = cache.mask(T, x.device)
            keys, values = cache.append(layer, keys, values)  # (B, H, S, D), S = tokens read so far + T
        drop_rate = self.drop_rate if self.training else 0.0
        if drop_rate and cache is None and x.device.type == "cpu":
            context = attend_on_cpu(queries, keys, values, drop_rate)
        else:
            context = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,  # is_causal would align its triangle to the first key, wrong with keys in a cache
                dropout_p=drop_rate,
                is_causal=mask is None and T > 1,
            )  # (B, H, T, D)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


def attend_on_cpu(queries: Tensor, keys: Tensor, values: Tensor, drop_rate: float) -> Tensor:
    """Causal attention with dropout, ``(B, H, T, D)``, in plain matrix products of the inputs' own precision.

    With dropout PyTorch's fused CPU kernel is not available, and what it has instead computes in float32 and draws its
    random numbers one by one: several times slower in bfloat16.
    """
    T, D = queries.shape[2:]
    with torch.autocast("cpu", enabled=False):  # which would widen the softmax
        scores = (queries * (1 / math.sqrt(D))) @ keys.transpose(-1, -2)  # (B, H, T, T)
        scores += torch.full((T, T), float("-inf"), dtype=scores.dtype).triu(1)
        return dropout(scores.softmax(dim=-1), drop_rate, training=True) @ values  # (B, H, T, D)
