"""One transformer layer in GPT-2's order: normalize, attend, add; normalize, feed forward, add."""

from torch import Tensor, nn

from src.model.attention import CausalSelfAttention
from src.model.cache import KVCache
from src.model.config import GPTConfig


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.activation = nn.GELU(approximate="tanh")
        self.down_proj = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.emb_dim)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.emb_dim)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), cache, layer))  # (B, T, C)
        return x + self.dropout(self.ff(self.norm2(x)))  # (B, T, C)
