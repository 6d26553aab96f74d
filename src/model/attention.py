"""Causal multi-head self-attention (Vaswani et al. 2017)."""

from torch import Tensor, nn
from torch.nn import functional as F

from src.model.cache import KVCache
from src.model.config import GPTConfig


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads)  # (B, T, 3, H, D)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        mask = None
        if cache is not None:
            mask = cache.mask(T, x.device)
            keys, values = cache.append(layer, keys, values)  # (B, H, S, D), S = cached tokens + T
        context = self.attend(queries, keys, values, mask)  # (B, H, T, D)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, C))  # (B, T, C)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The values ``(B, H, S, D)`` averaged for each query ``(B, H, T, D)`` over the keys that ``mask`` lets it see:
        its own position and earlier ones where the mask is None."""
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.drop_rate if self.training else 0.0,
            is_causal=mask is None and queries.shape[2] > 1,  # with T < S it would align the triangle to the first key
        )  # (B, H, T, D)
