import csv
import itertools

import pytest
import tiktoken

from src import cli
from src.model.config import GPTConfig
from src.train import Run, train

WORDS = "the ferry bell rang over a brown river while nobody waited on the far side".split()


def story_of(words: int) -> str:
    """A text of ``words`` words that is learnable and does not repeat itself."""
    return " ".join(WORDS[(i * i + i // 3) % len(WORDS)] for i in range(words))


def metrics_of(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.csv, empty cells left out."""
    with open(run.folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def column(run: Run, key: str) -> list[float]:
    return [row[key] for row in metrics_of(run) if key in row]


@pytest.fixture
def tiny() -> GPTConfig:
    return GPTConfig(vocab_size=101, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0)


@pytest.fixture(scope="session")
def letters() -> tiktoken.Encoding:
    """One token per byte, and end-of-text: 256."""
    return tiktoken.Encoding(
        "letters",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )


@pytest.fixture
def text(tmp_path):
    """A file of about 900 tokens."""
    path = tmp_path / "text.txt"
    path.write_text(story_of(900))
    return path


@pytest.fixture
def tiny_run(tmp_path, text):
    """Trains gpt2_tiny on ``text`` in this process, in a new folder each time: ``tiny_run("data.stride=8")``."""
    numbers = itertools.count()

    def run(*overrides: str) -> Run:
        cfg = cli.compose(
            "train",
            [
                "model=gpt2_tiny",
                "model.context_length=16",
                f"data.path={text}",
                "trainer.accelerator=cpu",
                "trainer.precision=32-true",
                "trainer.max_epochs=1",
                "eval.every_steps=1000",
                *overrides,
            ],
        )
        return train(cfg, tmp_path / f"run{next(numbers)}")

    return run


FAST = ("callbacks=none", "trainer.enable_checkpointing=false", "trainer.limit_val_batches=0")
