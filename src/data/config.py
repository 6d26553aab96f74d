"""What the data module needs to know, and what makes it impossible."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into windows; ``conf/data`` explains each key."""

    context_length: int | None = 256  # None: the model's, where a model is at hand
    path: str | None = None
    url: str | None = None
    mirrors: list[str] | None = None
    sha256: str | None = None
    size: int | None = None
    cache_dir: str | None = None
    batch_size: int = 2
    stride: int | None = None
    train_ratio: float = 0.9
    shuffle: bool = True
    num_workers: int = 0
    special_tokens: str = "parse"
    seed: int = 123

    def __post_init__(self) -> None:
        found = []
        if self.context_length is not None and self.context_length < 1:
            found.append(f"data.context_length={self.context_length} must be at least 1: model.context_length=256")
        if self.batch_size < 1:
            found.append(f"data.batch_size={self.batch_size} must be at least 1: data.batch_size=2")
        if self.stride is not None and self.stride < 1:
            found.append(f"data.stride={self.stride} must be at least 1: data.stride={self.context_length}")
        if not 0 < self.train_ratio < 1:
            found.append(f"data.train_ratio={self.train_ratio} must lie between 0 and 1: data.train_ratio=0.9")
        if self.num_workers < 0:
            found.append(f"data.num_workers={self.num_workers} cannot be negative: data.num_workers=0")
        if self.special_tokens not in ("parse", "text"):
            found.append(
                f"data.special_tokens={self.special_tokens} is neither parse nor text: data.special_tokens=parse"
            )
        if found:
            raise ValueError("\n".join(found))
