"""Keys and values of earlier tokens, so that generation computes them once."""

import torch
from torch import Tensor

from src.model.config import GPTConfig


class KVCache:
    """Preallocated keys and values of every layer, each ``(B, H, context_length, D)``.

    The caller makes it and passes it to ``GPT.forward``, which appends to it. ``length`` is the number of filled
    positions. Rows of different length are aligned at their ends: the first ``padding`` ``(B,)`` tokens of each are
    never attended to, and positions are counted from there.

    After :meth:`fix`, reading a single token has shapes and addresses that do not depend on ``length``, as a recorded
    CUDA graph needs.
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
        """Store ``(B, H, T, D)`` keys and values after the filled positions; return all filled ones, ``(B, H, S, D)``,
        S = length + T. A fixed cache returns all positions for a single token, to be masked."""
        if (place := self._fixed_place(keys.shape[2])) is not None:
            whole = self._keys[layer], self._values[layer]
            for kept, new in zip(whole, (keys, values), strict=True):
                kept.index_copy_(2, place, new)
            return whole
        end = self.length + keys.shape[2]
        self._keys[layer][:, :, self.length : end] = keys
        self._values[layer][:, :, self.length : end] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more positions as filled; called after every layer has appended them."""
        self.length += tokens
        if self._place is not None:
            self._place += tokens

    def fix(self) -> None:
        """Read single tokens in shapes that do not change, from now on."""
        self._place = torch.tensor([self.length], device=self._keys[0].device)
        for kept in self._keys + self._values:  # uninitialized memory may hold a NaN, and 0 * NaN is NaN
            kept[:, :, self.length :] = 0

    def rewind(self, length: int) -> None:
        """Forget what was appended beyond ``length``."""
        self.length = length
        if self._place is not None:
            self._place.fill_(length)

    def _fixed_place(self, tokens: int) -> Tensor | None:
        return self._place if tokens == 1 and self.padding is None else None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of the next ``tokens``, ``(T,)``, or ``(B, T)`` with padding."""
        if (place := self._fixed_place(tokens)) is not None:
            return place
        columns = torch.arange(self.length, self.length + tokens, device=device)
        return columns if self.padding is None else (columns - self.padding.unsqueeze(1)).clamp(min=0)

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """What the next ``tokens`` may attend to, ``(T, S)`` or ``(B, 1, T, S)`` bool with S = length + T.

        None if a single token sees all of it, or if it is the plain causal triangle.
        """
        if (place := self._fixed_place(tokens)) is not None:
            return (torch.arange(self._keys[0].shape[2], device=device) <= place).unsqueeze(0)  # (1, S)
        T, S = tokens, self.length + tokens
        if self.padding is None and T in (1, S):
            return None
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)  # (T, S)
        if self.padding is None:
            return causal
        seen = torch.arange(S, device=device) >= self.padding.unsqueeze(1)  # (B, S)
        # Padding sees itself: a row without any key would be NaN.
        itself = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, 1)
        return (causal & seen[:, None] | itself).unsqueeze(1)  # (B, 1, T, S)

    def select(self, rows: Tensor) -> None:
        """Keep the rows ``rows`` ``(N,)``, in that order and with repeats: beams, or samples of one prompt."""
        if self.padding is not None:
            self.padding = self.padding[rows]
        for kept in self._keys, self._values:
            for layer, old in enumerate(kept):
                filled = old[rows, :, : self.length]
                if len(rows) != len(old):
                    kept[layer] = old.new_empty(len(rows), *old.shape[1:])
                kept[layer][:, :, : self.length] = filled
