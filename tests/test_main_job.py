"""Slow: the two runs that the README quotes, at full size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.cli import overrides as cli
from src.cli.overrides import CONF
from src.data.download import fetch

pytestmark = pytest.mark.slow
REFERENCE = {  # the book's chapter 5 on The Verdict, before training
    "train/eval_loss": 10.98758347829183,
    "val/loss": 10.98110580444336,
}


def verdict() -> Path | None:
    """A copy of The Verdict beside this checkout or in the cache; None where there is none and no network."""
    beside = CONF.parents[1] / "shared" / "data" / "the-verdict.txt"
    if beside.exists():
        return beside
    data = cli.compose("train", ["data=the_verdict"]).data
    try:
        return fetch([data.url, *data.mirrors], data.sha256, data.size)
    except ValueError:
        return None


def train(folder: Path, *overrides: str) -> tuple[str, dict, list[dict[str, float]]]:
    import csv

    done = subprocess.run(
        [sys.executable, "-m", "src.train", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CONF.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = folder.glob("outputs/*/*")
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return done.stdout, json.loads((run / "run.json").read_text()), rows


def test_main_job_learns_the_story(tmp_path):
    output, record, rows = train(tmp_path, "model=gpt2_small", "trainer.max_epochs=10")
    assert record["parameters"] == 162_419_712
    assert record["optimizer_steps"] == 90
    assert 10.5 < rows[0]["train/eval_loss"] < 11.3
    assert record["train_loss"] < 1.0
    samples = re.findall(r"^greedy \| (.*)$", output, re.M)
    assert len(samples) == 11  # before training and after each epoch
    assert not any(words in samples[0] for words in ("the raft", "said Odile"))
    assert any(words in samples[-1] for words in ("the raft", "said Odile", "on the", "and the"))


def test_book(tmp_path):
    if verdict() is None:
        pytest.skip("The Verdict is neither beside this checkout nor to be fetched")
    book = ("experiment=book", f"data.path={verdict()}")
    (tmp_path / "whole").mkdir()  # before training the book evaluates all 9 batches, then 5
    output, record, rows = train(tmp_path / "whole", *book, "eval.batches=9", "trainer.max_steps=1")
    assert "18 windows in 9 batches" in output
    assert "of all 2 val windows (512 tokens) and all 18 train windows (4,608 tokens)" in output
    assert record["data_sha256"] == "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
    assert record["precision"] == "32-true"
    for key, value in REFERENCE.items():
        assert rows[0][key] == pytest.approx(value, abs=1e-5)
    output, record, rows = train(tmp_path, *book)
    assert "of all 2 val windows (512 tokens) and 10 train windows (2,560 tokens)" in output
    in_training = [row for row in rows if "val/loss" in row and row["step"]]
    assert len(in_training) == 18
    assert 0.25 < in_training[-1]["train/eval_loss"] < 1.2  # 0.4 to 0.8, by the order of the windows and dropout
    assert 6.1 < in_training[-1]["val/loss"] < 6.7
