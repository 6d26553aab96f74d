"""The shape of a GPT-2-family model, as numbers."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from src.config import Config


class GPTConfig(Config):
    """Sizes and switches of a :class:`~src.model.gpt.GPT`, named as in the book; defaults are GPT-2 small's.

    ``vocab_size=None``, kept as 0, stands for the tokenizer's until that is known; no model can be built of it.
    ``tie_weights`` lets the output head share the token embedding, as in OpenAI's GPT-2. ``init`` is ``gpt2`` (normal,
    std 0.02, residual projections scaled by 1/sqrt(2 * n_layers); Radford et al. 2019, section 2.3) or ``torch``
    (PyTorch's own defaults, drawn in the book's order). ``architecture`` is a key of
    :data:`~src.model.architectures.ARCHITECTURES`.

    Raises:
        ValueError: one line per problem. The upper limits lie beyond every model that was ever trained.
    """

    section: ClassVar[str] = "model"

    vocab_size: Annotated[int, BeforeValidator(lambda size: 0 if size is None else size)] = Field(
        default=50257, ge=0, le=10_000_000, examples=["null"]
    )
    context_length: int = Field(default=256, ge=1, le=10_000_000)
    emb_dim: int = Field(default=768, ge=1, le=100_000)
    n_heads: int = Field(default=12, ge=1, le=100_000)
    n_layers: int = Field(default=12, ge=1, le=10_000)
    drop_rate: float = Field(default=0.1, ge=0, lt=1)
    qkv_bias: bool = False
    tie_weights: bool = False
    init: Literal["gpt2", "torch"] = "gpt2"
    architecture: str = "gpt2"

    @model_validator(mode="after")
    def _heads_divide_the_embedding(self) -> "GPTConfig":
        if self.emb_dim % self.n_heads:
            fits = max(n for n in range(1, min(self.n_heads, self.emb_dim) + 1) if self.emb_dim % n == 0)
            nearest = max(round(self.emb_dim / self.n_heads), 1) * self.n_heads
            raise ValueError(
                f"model.emb_dim={self.emb_dim} is not divisible by model.n_heads={self.n_heads}; "
                f"use model.n_heads={fits} or model.emb_dim={nearest}"
            )
        return self
