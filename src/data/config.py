"""The configurations of the data module and of src.prepare."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from src.config import Config
from src.data.manifest import Part
from src.files import expanded

SIZES = {"gpt2": 50257, "byte": 257, "cl100k_base": 100277, "o200k_base": 200019}


class TokenizerConfig(Config):
    """``gpt2`` (packaged); ``byte``: one token per byte; ``char``: one per character of the training text; ``bpe``:
    byte-level byte-pair encoding of ``vocab_size`` tokens, trained on the training text; ``cl100k_base`` and
    ``o200k_base``, which tiktoken downloads and caches; ``file``: the one at ``path``, a ``.tiktoken`` table (with
    GPT-2's pattern) or a ``tokenizer.json`` of Hugging Face."""

    section: ClassVar[str] = "tokenizer"

    name: Literal["gpt2", "byte", "char", "bpe", "cl100k_base", "o200k_base", "file"] = "gpt2"
    vocab_size: int | None = Field(default=None, ge=258, le=1_000_000, examples=[4096])
    path: str | None = None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "TokenizerConfig":
        if self.name == "bpe" and self.vocab_size is None:
            raise ValueError("tokenizer.name=bpe has no size; use tokenizer=bpe")
        if self.name == "file" and not self.path:
            raise ValueError(
                "tokenizer.name=file names none; use tokenizer=file tokenizer.path=<a tokenizer.json or a table>"
            )
        return self

    @property
    def size(self) -> int | None:
        """The number of its tokens, as far as that is known before the text is read."""
        return self.vocab_size if self.name == "bpe" else SIZES.get(self.name)


class DataConfig(Config):
    """Where the text comes from and how it is cut into windows. ``conf/data`` explains each key."""

    section: ClassVar[str] = "data"

    context_length: int | None = Field(default=256, ge=1)  # None: the model's
    format: Literal["text", "shards"] = "text"
    path: str | None = None
    url: str | None = None
    mirrors: list[str] | None = None
    sha256: str | None = None
    size: int | None = None
    train_shards: int | None = Field(default=None, ge=1)
    prepare: dict[str, Any] | None = None
    cache_dir: str | None = None
    batch_size: int = Field(default=2, ge=1)
    stride: int | None = Field(default=None, ge=1)
    train_ratio: float = Field(default=0.9, gt=0, lt=1)
    shuffle: bool = True
    shift: bool = False
    num_workers: int = Field(default=0, ge=0)
    special_tokens: Literal["parse", "text"] = "parse"
    seed: int = 123

    @model_validator(mode="after")
    def _shards_have_a_path(self) -> "DataConfig":
        if self.format == "shards" and self.path is None and self.url is None:
            raise ValueError(f"data.path=null names no shards; {self.cure_for_no_shards}")
        return self

    def fixed_values(self, context_length: int) -> dict[str, Any]:
        """What a resumed run with windows of ``context_length`` tokens may not change, by override: its batches depend
        on it."""
        keys = ["batch_size", "train_ratio", "shuffle", "shift", *["special_tokens"] * (self.format == "text")]
        values = {key: getattr(self, key) for key in keys}
        values |= {"context_length": context_length, "stride": self.stride or context_length}
        return {f"data.{key}": value for key, value in values.items()}

    @property
    def cure_for_no_shards(self) -> str:
        if self.prepare is None:
            return "use data.path=<their folder, or a glob pattern>"
        name, folder = self.prepare["name"], self.path or self.prepare["name"]
        return f"make them with python -m src.prepare source={name} output={folder}, then use data.path={folder}"

    @property
    def source(self) -> str:
        return self.path or self.url or "the packaged story"


class PrepareConfig(Config):
    """Which files become shards, and how. ``conf/prepare.yaml`` explains each key. Keys that a user adds are kept."""

    model_config = ConfigDict(extra="allow")

    source: str | list[str] = Field(examples=["<a file, folder, glob pattern or list of them>"], min_length=1)
    output: str | None = "my_shards"
    name: str | None = Field(default=None, examples=["my_text"])
    text_key: str = "text"
    shard_tokens: int = Field(default=100_000_000, ge=1, lt=2**31)  # the header counts in 32 bits
    val_tokens: int | None = Field(default=None, ge=0, lt=2**31)  # None: a tenth of all, at most shard_tokens
    max_tokens: int | None = Field(default=None, ge=1)
    special_tokens: Literal["parse", "text"] = "parse"
    tokenizer: TokenizerConfig = TokenizerConfig()
    workers: int | None = Field(default=None, ge=1)  # None: one per core
    part: str | None = None  # 3/16: the third of 16 parts of the files
    dry_run: bool = False

    @model_validator(mode="after")
    def _shards_can_have_the_name_and_tokens(self) -> "PrepareConfig":
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise ValueError(f"name={self.name} is not a file name; use name=my_text")
        if self.output is None and not self.dry_run:
            raise ValueError("output is needed; use output=my_shards")
        Part.parse(self.part)
        if self.tokenizer.name in ("char", "bpe"):
            raise ValueError(
                f"tokenizer={self.tokenizer.name} is made from a training text, which shards do not have yet; use "
                f"tokenizer=file tokenizer.path=<the tokenizer.json of a run with it>, or tokenizer=gpt2"
            )
        return self

    @property
    def folder(self) -> Path:
        assert self.output is not None
        return expanded(self.output)

    @property
    def paths(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source
