"""What the data module needs to know, and what makes it impossible."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into windows; ``conf/data`` explains each key."""

    context_length: int | None = 256  # None: the model's, where a model is at hand
    format: str = "text"
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
        if self.format not in ("text", "shards"):
            found.append(f"data.format={self.format} is neither text nor shards: data=text or data=shards")
        if self.format == "shards" and self.path is None:
            found.append("data.path=null has no shards: data.path=<their folder, or a glob pattern>")
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

    @property
    def source(self) -> str:
        return self.path or self.url or "the packaged story"


@dataclass(frozen=True)
class PrepareConfig:
    """From which files shards are made, and how; ``conf/prepare.yaml`` explains each key."""

    source: Any = None  # a path or a list of them
    output: str = "my_shards"
    name: str | None = None
    text_key: str = "text"
    shard_tokens: int = 100_000_000
    val_tokens: int | None = None  # None: a tenth of all, at most shard_tokens
    special_tokens: str = "parse"
    workers: int | None = None  # None: one per core

    def __post_init__(self) -> None:
        found = []
        if not self.paths:
            found.append(f"source={self.source} names no file: source=<a file, folder, glob pattern or list of them>")
        if not 1 <= self.shard_tokens < 2**31:  # the header counts in 32 bits
            found.append(f"shard_tokens={self.shard_tokens} must lie between 1 and {2**31 - 1}: shard_tokens=100000000")
        if self.val_tokens is not None and not 0 <= self.val_tokens < 2**31:
            found.append(f"val_tokens={self.val_tokens} must lie between 0 and {2**31 - 1}: val_tokens=null")
        if self.workers is not None and self.workers < 1:
            found.append(f"workers={self.workers} must be at least 1: workers=null")
        if self.special_tokens not in ("parse", "text"):
            found.append(f"special_tokens={self.special_tokens} is neither parse nor text: special_tokens=parse")
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            found.append(f"name={self.name} is no file name: name=my_text")
        if found:
            raise ValueError("\n".join(found))

    @property
    def paths(self) -> list[str]:
        several = (
            self.source if isinstance(self.source, Sequence) and not isinstance(self.source, str) else [self.source]
        )
        return [str(path) for path in several if path is not None]
