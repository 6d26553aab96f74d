"""The shape of a GPT-2-family model, as numbers."""

from dataclasses import dataclass, fields
from reprlib import repr as shown

# Beyond every model that was ever trained, and few enough for a search through them to take no time.
LARGEST = {
    "vocab_size": 10_000_000,
    "context_length": 10_000_000,
    "emb_dim": 100_000,
    "n_heads": 100_000,
    "n_layers": 10_000,
}


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a :class:`~src.model.gpt.GPT`, named as in the book; defaults are GPT-2 small's.

    ``tie_weights`` lets the output head share the token embedding, as OpenAI's GPT-2 does. ``init`` is ``gpt2``
    (normal, std 0.02, residual projections scaled by 1/sqrt(2 * n_layers); Radford et al. 2019, section 2.3) or
    ``torch`` (PyTorch's own defaults, drawn in the book's order).
    """

    vocab_size: int = 50257
    context_length: int = 256
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_weights: bool = False
    init: str = "gpt2"

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """Every reason why no model can have these numbers, one line each, with the override that mends it."""
        wrong = [
            f"model.{field.name}={shown(getattr(self, field.name))} is not of type {field.type.__name__}: "
            f"model.{field.name}={field.default}"
            for field in fields(self)
            if type(getattr(self, field.name)) not in ((int, float) if field.type is float else (field.type,))
        ]
        if wrong:
            return wrong
        found = [
            f"model.{field.name}={shown(getattr(self, field.name))} must lie between 1 and {LARGEST[field.name]:,}: "
            f"model.{field.name}={field.default}"
            for field in fields(self)
            if field.name in LARGEST and not 1 <= getattr(self, field.name) <= LARGEST[field.name]
        ]
        if not found and self.emb_dim % self.n_heads:
            fits = max(h for h in range(1, min(self.n_heads, self.emb_dim) + 1) if self.emb_dim % h == 0)
            nearest = max(round(self.emb_dim / self.n_heads), 1) * self.n_heads
            found.append(
                f"model.emb_dim={self.emb_dim} is not divisible by model.n_heads={self.n_heads}: "
                f"model.n_heads={fits} or model.emb_dim={nearest}"
            )
        if not 0 <= self.drop_rate < 1:
            found.append(f"model.drop_rate={shown(self.drop_rate)} must lie in [0, 1): model.drop_rate=0.1")
        if self.init not in ("gpt2", "torch"):
            found.append(f"model.init={shown(self.init)} is neither gpt2 nor torch: model.init=gpt2")
        return found
