"""Attention with dropout on the CPU, where PyTorch's fused kernel does not support dropout."""

import math

import torch
from torch import Tensor

from src.kernels.dropout import dropout
from src.model.attention import CausalSelfAttention


class FastAttention(CausalSelfAttention):
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        causal = mask is None and queries.shape == keys.shape
        if self.training and self.drop_rate and causal and queries.device.type == "cpu":
            return causal_attention(queries, keys, values, self.drop_rate)
        return super().attend(queries, keys, values, mask)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, drop_rate: float) -> Tensor:
    """``F.scaled_dot_product_attention(..., dropout_p=drop_rate, is_causal=True)`` of ``(B, H, T, D)``, as matrix
    products in the precision of the inputs.

    With dropout on the CPU, PyTorch computes in float32 and draws its random numbers one by one.

    Gain: 1.3 to 2.9 on AMD, the most in bfloat16; 1.09 in float32 and 0.89 in bfloat16, which it emulates, on Intel.
    """
    T, D = queries.shape[2:]
    with torch.autocast("cpu", enabled=False):  # which would compute the softmax in float32
        scores = (queries * (1 / math.sqrt(D))) @ keys.transpose(-1, -2)  # (B, H, T, T)
        scores += torch.full((T, T), float("-inf"), dtype=scores.dtype).triu(1)
        return dropout(scores.softmax(dim=-1), drop_rate) @ values  # (B, H, T, D)
