"""Interrupt a run with real signals, resume it, compare: ``python -m src.verify_resume [overrides of src.train]``."""

import csv
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src import cli
from src.record import read_record
from src.train import find_problems as problems_of_training

log = logging.getLogger(__name__)

OWN_EXIT = {"TERM": 128 + signal.SIGTERM, "INT": 128 + signal.SIGINT, "KILL": -signal.SIGKILL}


def find_problems(cfg: DictConfig) -> list[str]:
    found = problems_of_training(cfg)
    if not isinstance(cfg.verify.kills, int) or cfg.verify.kills < 1:
        found.append(f"verify.kills={cfg.verify.kills} must be at least 1: verify.kills=3")
    if unknown := [name for name in cfg.verify.signals if name not in OWN_EXIT]:
        found.append(f"verify.signals={unknown} is none of KILL, TERM, INT: 'verify.signals=[KILL,TERM,INT]'")
    if not any("MetricsCSV" in str(logger.get("_target_")) for logger in cfg.logger.values()):
        found.append("logger must write metrics.csv, which is compared: logger=csv")
    if cfg.resume or cfg.dry_run:
        found.append("resume and dry_run have no meaning here: resume=null dry_run=false")
    return found


def verify(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Train once undisturbed and once interrupted ``cfg.verify.kills`` times, both under ``folder``.

    Raises:
        ValueError: the two differ, with the first step that does; or a run failed by itself.
    """
    own = ("verify.", "checkpoint.every_steps")
    overrides = [override for override in overrides if not override.lstrip("+").startswith(own)]
    overrides.append(f"checkpoint.every_steps={cfg.checkpoint.every_steps}")
    whole, cut = folder / "uninterrupted", folder / "interrupted"
    process = _start([*overrides, f"hydra.run.dir={whole}"], folder / "uninterrupted.log")
    if process.wait() != 0:
        raise ValueError(f"the undisturbed run failed by itself: see {folder / 'uninterrupted.log'}")
    steps = read_record(whole)["optimizer_steps"]
    seconds_per_step = read_record(whole)["seconds"] / steps
    log.info("undisturbed: %d steps", steps)

    draw = random.Random(cfg.verify.seed)
    targets = sorted(draw.choices(range(1, max(steps, 2)), k=cfg.verify.kills))
    for number, target in enumerate(targets):
        name = cfg.verify.signals[number % len(cfg.verify.signals)]
        process = _start(_begin_or_resume(overrides, cut), folder / "interrupted.log")
        while process.poll() is None and _last_step(cut) < target:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 2 * seconds_per_step))  # anywhere: in a step, in an evaluation, in a save
        seen = _last_step(cut)
        process.send_signal(getattr(signal, f"SIG{name}"))
        status = process.wait()
        if status not in (0, OWN_EXIT[name]):
            raise ValueError(f"SIG{name} at step {seen}: exit status {status}: see {folder / 'interrupted.log'}")
        saved = _saved_step(cut)
        log.info("SIG%s at step %d: exit status %d, saved at step %d", name, seen, status, saved)
        if name != "KILL" and status and not seen <= saved <= seen + 1:
            raise ValueError(f"SIG{name} at step {seen} was saved at step {saved}, not within one step")
    if _start(_begin_or_resume(overrides, cut), folder / "interrupted.log").wait() not in (0, 1):
        raise ValueError(f"the resumed run failed by itself: see {folder / 'interrupted.log'}")
    if difference := first_difference(whole, cut):
        raise ValueError(f"not the same: {difference}: see {whole} and {cut}")
    log.info("bit-identical: %d steps, %d interruptions, losses, weights and optimizer", steps, len(targets))


def first_difference(whole: Path, cut: Path) -> str | None:
    """Where two run folders differ first, None where they are bit-identical: in a step's metrics (but for speed), in
    the final losses, in weights or optimizer state of the checkpoints, in the text samples."""
    import torch

    rows, others = (_rows(run / "metrics.csv") for run in (whole, cut))
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
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "tokens_seen"):
            if place := _difference(states[0][key], states[1][key], key):
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
    return [f"resume={folder}"] if read_record(folder) else [*overrides, f"hydra.run.dir={folder}"]


def _start(arguments: list[str], output: Path) -> subprocess.Popen:
    with output.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "src.train", *arguments], stdout=file, stderr=file)


def _rows(path: Path) -> list[dict[str, str]]:
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


def _run(cfg: DictConfig) -> None:
    hydra = HydraConfig.get()
    verify(cfg, Path(hydra.runtime.output_dir), list(hydra.overrides.task))


if __name__ == "__main__":
    cli.launch("verify_resume", _run, find_problems)
