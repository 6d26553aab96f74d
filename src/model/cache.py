"""Keys and values of the tokens already read, so that generation never reads them twice."""

import torch
from torch import Tensor

from src.model.config import GPTConfig


class KVCache:
    """Preallocated keys and values of every layer, each ``(B, H, context_length, D)``.

    A plain value: made by the caller, passed to ``GPT.forward``, which appends to it. ``length`` is the number of
    positions filled so far.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        shape = (batch_size, config.n_heads, config.context_length, config.emb_dim // config.n_heads)
        self.length = 0
        self._keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self._values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``(B, H, T, D)`` keys and values behind the filled positions; return all filled ones, new included."""
        end = self.length + keys.shape[2]
        self._keys[layer][:, :, self.length : end] = keys
        self._values[layer][:, :, self.length : end] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` positions as filled, once every layer has appended them."""
        self.length += tokens
