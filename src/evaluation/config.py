"""What to evaluate, and what makes it impossible."""

from dataclasses import dataclass

from src.generation.config import DEVICES


@dataclass(frozen=True)
class EvaluationConfig:
    """The keys of ``conf/evaluate.yaml``, which explains them."""

    weights: str = "gpt2"
    split: str = "val"
    context_length: int | None = None
    stride: int | None = None
    surprises: int = 20
    lambada: str | None = None
    multiple_choice: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        found = []
        if self.split not in ("val", "train", "all"):
            found.append(f"split={self.split} is none of val, train, all: split=val")
        for key, value in ("context_length", self.context_length), ("stride", self.stride):
            if value is not None and value < 1:
                found.append(f"{key}={value} must be at least 1, or null for the model's context_length: {key}=null")
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
