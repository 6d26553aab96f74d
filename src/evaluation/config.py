"""What to evaluate, and what makes it impossible."""

from dataclasses import dataclass

from src.generation.config import DEVICES

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


@dataclass(frozen=True)
class EvaluationConfig:
    """The keys of ``conf/evaluate.yaml``, which explains them."""

    weights: str = "gpt2"
    split: str = "val"
    max_tokens: int | None = None
    context_length: int | None = None
    stride: int | None = None
    surprises: int = 20
    lambada: str | None = None
    multiple_choice: str | None = None
    device: str = "auto"
    precision: str | None = None

    def __post_init__(self) -> None:
        found = []
        if self.split not in ("val", "train", "all"):
            found.append(f"split={self.split} is none of val, train, all: split=val")
        for key, value in ("context_length", self.context_length), ("stride", self.stride):
            if value is not None and value < 1:
                found.append(f"{key}={value} must be at least 1, or null for the model's context_length: {key}=null")
        if self.max_tokens is not None and self.max_tokens != -1 and self.max_tokens < 1:
            found.append(f"max_tokens={self.max_tokens} must be at least 1, or -1 for every token: max_tokens=-1")
        if self.stride and self.max_tokens not in (None, -1):
            found.append(f"stride={self.stride} scores every token, not max_tokens={self.max_tokens}: max_tokens=-1")
        if self.precision not in (None, *PRECISIONS):
            found.append(f"precision={self.precision} is none of {', '.join(PRECISIONS)}: precision=null")
        if self.stride and self.context_length and self.stride > self.context_length:
            found.append(
                f"stride={self.stride} would leave tokens out between windows of context_length={self.context_length}: "
                f"stride={self.context_length}"
            )
        if self.surprises < 0:
            found.append(f"surprises={self.surprises} cannot be negative: surprises=20")
        if self.device not in DEVICES:
            found.append(f"device={self.device} is none of {', '.join(DEVICES)}: device=auto")
        if found:
            raise ValueError("\n".join(found))
