"""Interrupts a run with real signals at random moments, resumes it, and compares it with an undisturbed one."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.cli.overrides import CONF
from src.cli.quoting import quoted
from src.runs.record import read_record

OWN_EXIT = {"TERM": 128 + signal.SIGTERM, "INT": 128 + signal.SIGINT, "KILL": -signal.SIGKILL}


def interrupt(folder: Path, overrides: list[str], kills: int, signals: list[str], seed: int = 0) -> list[int]:
    """Train once undisturbed and once interrupted ``kills`` times by ``signals`` in turn, both under ``folder``; assert
    that both runs are bit-identical, and return the exit statuses of the interrupted processes."""
    whole, cut = folder / "uninterrupted", folder / "interrupted"
    statuses = []
    with _started([*overrides, f"hydra.run.dir={quoted(whole)}"], folder / "uninterrupted.log") as process:
        assert process.wait() == 0, (folder / "uninterrupted.log").read_text()
    steps = read_record(whole)["optimizer_steps"]
    seconds_per_step = read_record(whole)["seconds"] / steps
    draw = random.Random(seed)
    for number, target in enumerate(sorted(draw.choices(range(1, max(steps, 2)), k=kills))):
        name = signals[number % len(signals)]
        attempts = len(_attempts(cut))
        with _started(_begin_or_resume(overrides, cut), folder / "interrupted.log") as process:
            begun = False
            while process.poll() is None and not (begun and _last_step(cut) >= target):
                begun = begun or (len(_attempts(cut)) > attempts and (cut / "metrics.csv").exists())
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 2 * seconds_per_step))  # anywhere: in a step, in an evaluation, in a save
            seen = _last_step(cut)
            process.send_signal(getattr(signal, f"SIG{name}"))
            status = process.wait()
        output = (folder / "interrupted.log").read_text()
        completed = read_record(cut).get("status") == "completed"
        assert completed or status == OWN_EXIT[name], output
        saved = _saved_step(cut)
        logged = seen > (_attempts(cut) or [0])[-1]  # by this attempt, not by one before
        if name != "KILL" and not completed and logged:
            assert 0 <= saved - seen <= 1, f"SIG{name} at step {seen} was saved at step {saved}"
        statuses.append(status)
    if read_record(cut).get("status") != "completed":
        with _started(_begin_or_resume(overrides, cut), folder / "interrupted.log") as process:
            assert process.wait() == 0, (folder / "interrupted.log").read_text()
    assert "Traceback" not in (folder / "interrupted.log").read_text()
    assert first_difference(whole, cut) is None
    return statuses


def first_difference(whole: Path, cut: Path) -> str | None:
    """Where two run folders differ first, None where they are bit-identical: in a step's metrics (but for speed), in
    the final losses, in weights, averages or optimizer state of the checkpoints, in the text samples."""
    import torch

    rows, others = (rows_of(run / "metrics.csv") for run in (whole, cut))
    for row, other in zip(rows, others, strict=False):
        for key in row:
            if not key.startswith("perf/") and row[key] != other.get(key):
                return f"step {row['step']}, {key}: {row[key]} and {other.get(key)}"
    if len(rows) != len(others):
        return f"{len(rows)} and {len(others)} logged steps"
    records = [read_record(run) for run in (whole, cut)]
    for key in ("status", "optimizer_steps", "tokens_seen", "train_loss", "val_loss", "val_perplexity"):
        if records[0].get(key) != records[1].get(key):
            return f"final {key}: {records[0].get(key)} and {records[1].get(key)}"
    for name in ("last.ckpt", "best.ckpt"):
        files = [run / "checkpoints" / name for run in (whole, cut)]
        if not any(file.exists() for file in files):
            continue
        states = [torch.load(file, weights_only=True, mmap=True) for file in files]
        for key in ("state_dict", "averaging", "optimizer_states", "lr_schedulers", "global_step", "tokens_seen"):
            if place := _difference(states[0].get(key), states[1].get(key), key):
                return f"{name}: {place}"
    samples = [run / "samples.md" for run in (whole, cut)]
    if samples[0].exists() and samples[0].read_text() != samples[1].read_text():
        return "samples.md"
    return None


def _difference(one: Any, other: Any, place: str) -> str | None:
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return place
        return next(filter(None, (_difference(one[key], other[key], f"{place}.{key}") for key in one)), None)
    if isinstance(one, list):
        pairs = zip(one, other, strict=True)
        return next(filter(None, (_difference(*pair, f"{place}.{at}") for at, pair in enumerate(pairs))), None)
    same = one.equal(other) if hasattr(one, "equal") else one == other
    return None if same else place


def _begin_or_resume(overrides: list[str], folder: Path) -> list[str]:
    place = "resume" if read_record(folder) else "hydra.run.dir"
    return [*([] if place == "resume" else overrides), f"{place}={quoted(folder)}"]


def _attempts(folder: Path) -> list[int]:
    """The steps at which processes began to train in ``folder``."""
    record = read_record(folder)
    return [0, *record.get("resumed_at", [])] if record else []


@contextmanager
def _started(arguments: list[str], output: Path) -> Iterator[subprocess.Popen]:
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "src.train", *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": f"{CONF.parent}:{os.environ.get('PYTHONPATH', '')}"},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _last_step(folder: Path) -> int:
    try:
        with (folder / "metrics.csv").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            steps = [line.split(b",")[0] for line in file.read().splitlines()[-2:]]
    except OSError:
        return -1
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def _saved_step(folder: Path) -> int:
    import torch

    file = folder / "checkpoints" / "last.ckpt"
    return torch.load(file, weights_only=True, mmap=True)["global_step"] if file.exists() else -1
