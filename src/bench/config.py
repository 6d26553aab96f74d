"""What to measure."""

import importlib.util
from typing import Literal

from pydantic import Field, model_validator

from src.config import refuse
from src.training.config import TrainConfig

PEERS = {"book": "llms_from_scratch", "transformers": "transformers", "litgpt": "litgpt"}
PROMPT = 8  # tokens


class BenchmarkConfig(TrainConfig):
    """The keys of training and those that ``conf/benchmark.yaml`` adds and explains."""

    measure: tuple[Literal["training", "generation", "preparation"], ...] = Field(
        default=("training", "generation"), min_length=1, examples=[["training"]]
    )
    peers: tuple[Literal["book", "transformers", "litgpt"], ...] = Field(default=(), examples=[["book"]])
    peers_precision: Literal["32-true", "bf16-mixed"] = "32-true"
    rounds: int = Field(default=5, ge=1)
    steps: int = Field(default=3, ge=1)
    new_tokens: int = Field(default=128, ge=1)
    source: str | None = None
    output: str | None = None

    @model_validator(mode="after")
    def _can_be_measured(self) -> "BenchmarkConfig":
        found = [
            f"{key}={getattr(self, key)} makes no difference to speed; leave it out"
            for key in ("weights", "ckpt_path", "resume")
            if getattr(self, key)
        ]
        if self.auto_batch:
            found.append("data.batch_size=auto is not one batch to measure; use data.batch_size=2")
        if missing := [name for name in self.peers if not importlib.util.find_spec(PEERS[name])]:
            found.append(f"peers=[{','.join(missing)}] is not installed; use pip install -e '.[bench]', or peers=[]")
        if "preparation" in self.measure and not self.source:
            found.append("source=null has nothing to prepare; use source=<a txt, jsonl or parquet file>")
        longest = self.model.context_length - PROMPT
        if "generation" in self.measure and self.new_tokens > longest:
            found.append(f"new_tokens={self.new_tokens} do not fit the context; use new_tokens={longest}")
        refuse(found)
        return self
