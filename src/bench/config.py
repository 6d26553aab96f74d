"""What to measure."""

import importlib.util
from typing import Literal

from pydantic import Field, model_validator

from src.config import Config

PEERS = {"book": "llms_from_scratch", "transformers": "transformers", "litgpt": "litgpt"}


class BenchmarkConfig(Config):
    """The keys that ``conf/benchmark.yaml`` adds to those of training."""

    measure: list[Literal["training", "generation", "preparation"]] = Field(["training", "generation"], min_length=1)
    peers: list[Literal["book", "transformers", "litgpt"]] = Field(default_factory=list)
    peers_precision: Literal["32-true", "bf16-mixed"] = "32-true"
    rounds: int = Field(5, ge=1)
    steps: int = Field(3, ge=1)
    new_tokens: int = Field(128, ge=1)
    source: str | None = None
    output: str | None = None

    @model_validator(mode="after")
    def _what_is_measured_is_there(self) -> "BenchmarkConfig":
        found = []
        if missing := [name for name in self.peers if not importlib.util.find_spec(PEERS[name])]:
            found.append(f"peers=[{','.join(missing)}] is not installed: pip install -e '.[bench]'; or use peers=[]")
        if "preparation" in self.measure and not self.source:
            found.append("source=null has nothing to prepare; use source=<a txt, jsonl or parquet file>")
        if found:
            raise ValueError("\n".join(found))
        return self
