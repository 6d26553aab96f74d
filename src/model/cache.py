"""Keys and values of the tokens already read, so that generation never reads them twice."""

import torch
from torch import Tensor

from src.model.config import GPTConfig


class KVCache:
    """Preallocated keys and values of every layer, each ``(B, H, context_length, D)``.

    A plain value: made by the caller, passed to ``GPT.forward``, which appends to it. ``length`` is the number of
    positions filled so far. Of rows of different length, aligned at their ends, the first ``padding`` ``(B,)`` of
    each are never attended to, and its positions are counted from there.

    Once :meth:`fix` was called, reading a single token has shapes and addresses that do not depend on ``length``: what
    a recorded CUDA graph needs.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        padding: Tensor | None = None,
    ) -> None:
        shape = (batch_size, config.n_heads, config.context_length, config.emb_dim // config.n_heads)
        self.length = 0
        self.padding = padding
        self._place: Tensor | None = None  # of the next token, on the device
        self._keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self._values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``(B, H, T, D)`` keys and values behind the filled positions; return all filled ones, new included;
        of a fixed cache, for a single token, all positions, to be masked."""
        if self._fixed(keys.shape[2]):
            whole = self._keys[layer], self._values[layer]
            for kept, new in zip(whole, (keys, values), strict=True):
                kept.index_copy_(2, self._place, new)
            return whole
        end = self.length + keys.shape[2]
        self._keys[layer][:, :, self.length : end] = keys
        self._values[layer][:, :, self.length : end] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` positions as filled, once every layer has appended them."""
        self.length += tokens
        if self._place is not None:
            self._place += tokens

    def fix(self) -> None:
        """From now on read single tokens in shapes that do not change."""
        self._place = torch.tensor([self.length], device=self._keys[0].device)
        for kept in self._keys + self._values:  # a NaN that was never written would not be masked: 0 * NaN is NaN
            kept[:, :, self.length :] = 0

    def rewind(self, length: int) -> None:
        """Forget what was appended beyond ``length``."""
        self.length = length
        if self._place is not None:
            self._place.fill_(length)

    def _fixed(self, tokens: int) -> bool:
        return self._place is not None and tokens == 1 and self.padding is None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of the next ``tokens``, ``(T,)``, or ``(B, T)`` with padding."""
        if self._fixed(tokens):
            return self._place
        columns = torch.arange(self.length, self.length + tokens, device=device)
        return columns if self.padding is None else (columns - self.padding.unsqueeze(1)).clamp(min=0)

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """What the next ``tokens`` may attend to, ``(T, S)`` or ``(B, 1, T, S)`` bool, S = length + T.

        None where all of it is seen by a single token, or where it is the plain triangle.
        """
        if self._fixed(tokens):
            return (torch.arange(self._keys[0].shape[2], device=device) <= self._place).unsqueeze(0)  # (1, S)
        T, S = tokens, self.length + tokens
        if self.padding is None and T in (1, S):
            return None
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)  # (T, S)
        if self.padding is None:
            return causal
        seen = torch.arange(S, device=device) >= self.padding.unsqueeze(1)  # (B, S)
        itself = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, 1)  # padding sees at least itself: no NaN
        return (causal & seen[:, None] | itself).unsqueeze(1)  # (B, 1, T, S)

    def select(self, rows: Tensor) -> None:
        """Let the cache hold its rows ``rows`` ``(N,)``, in that order: beams or samples that share what was read."""
        if self.padding is not None:
            self.padding = self.padding[rows]
        for kept in self._keys, self._values:
            for layer, old in enumerate(kept):
                filled = old[rows, :, : self.length]
                if len(rows) != len(old):
                    kept[layer] = old.new_empty(len(rows), *old.shape[1:])
                kept[layer][:, :, : self.length] = filled
