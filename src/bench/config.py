"""What to measure, and what makes that impossible."""

import importlib.util
from dataclasses import dataclass, field

MEASURES = ("training", "generation", "preparation")
PEERS = {"book": "llms_from_scratch", "transformers": "transformers", "litgpt": "litgpt"}


@dataclass(frozen=True)
class BenchmarkConfig:
    """The keys of ``conf/benchmark.yaml`` itself."""

    measure: list[str] = field(default_factory=lambda: ["training", "generation"])
    peers: list[str] = field(default_factory=list)
    peers_precision: str = "32-true"
    rounds: int = 5
    steps: int = 3
    new_tokens: int = 128
    source: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        found = []
        for key, known in ("measure", MEASURES), ("peers", tuple(PEERS)):
            if unknown := [name for name in getattr(self, key) if name not in known]:
                found.append(f"{key}=[{','.join(unknown)}] is none of {', '.join(known)}: {key}=[{known[0]}]")
        if not self.measure:
            found.append("measure=[] measures nothing: measure=[training]")
        missing = [name for name in self.peers if name in PEERS and not importlib.util.find_spec(PEERS[name])]
        if missing:
            found.append(f"peers=[{','.join(missing)}] are not installed: pip install -e '.[bench]', or peers=[]")
        for key, cure in ("rounds", 5), ("steps", 3), ("new_tokens", 128):
            if getattr(self, key) < 1:
                found.append(f"{key}={getattr(self, key)} must be at least 1: {key}={cure}")
        if self.peers_precision not in ("32-true", "bf16-mixed"):
            found.append(
                f"peers_precision={self.peers_precision} is neither 32-true nor bf16-mixed: peers_precision=32-true"
            )
        if "preparation" in self.measure and not self.source:
            found.append("measure=[preparation] needs a text: source=<a txt, jsonl or parquet file>")
        if found:
            raise ValueError("\n".join(found))
