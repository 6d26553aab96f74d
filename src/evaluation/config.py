"""What to evaluate."""

from typing import Literal

from pydantic import Field, model_validator

from src.config import Config
from src.generation.config import Device

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]


class EvaluationConfig(Config):
    """The keys of ``conf/evaluate.yaml``, which explains them."""

    weights: str = "gpt2"
    split: Literal["val", "train", "all"] = "val"
    max_tokens: int | None = Field(None, ge=-1, examples=[-1])
    context_length: int | None = Field(None, ge=1)
    stride: int | None = Field(None, ge=1)
    surprises: int = Field(20, ge=0)
    lambada: str | None = None
    multiple_choice: str | None = None
    device: Device = "auto"
    precision: Precision | None = None

    @model_validator(mode="after")
    def _windows_cover_what_is_scored(self) -> "EvaluationConfig":
        found = []
        if self.max_tokens == 0:
            found.append("max_tokens=0 must be at least 1, or -1 for every token; use max_tokens=-1")
        if self.stride and self.max_tokens not in (None, -1):
            found.append(
                f"stride={self.stride} scores every token, not max_tokens={self.max_tokens}; use max_tokens=-1"
            )
        if self.stride and self.context_length and self.stride > self.context_length:
            found.append(
                f"stride={self.stride} would leave out tokens between windows of context_length={self.context_length}; "
                f"use stride={self.context_length}"
            )
        if found:
            raise ValueError("\n".join(found))
        return self
