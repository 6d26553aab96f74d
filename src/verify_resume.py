"""Interrupt a run with real signals, resume it, compare: ``python -m src.verify_resume [overrides of src.train]``."""

import csv
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.cli import app
from src.runs.record import read_record
from src.cli.resume import quoted
from src.train import find_problems as problems_of_training

log = logging.getLogger(__name__)

WANTED = {
    "resume": None,
    "dry_run": False,
    "trainer.enable_checkpointing": True,
    "trainer.fast_dev_run": False,
    "trainer.max_time": None,
    "trainer.overfit_batches": 0.0,
}
OWN_EXIT = {"TERM": 128 + signal.SIGTERM, "INT": 128 + signal.SIGINT, "KILL": -signal.SIGKILL}


@dataclass(frozen=True)
class VerifyConfig:
    """How often to interrupt, with which signals in turn, and the seed of the moments."""

    kills: int = 0
    signals: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kills, int) or self.kills < 1:
            raise ValueError(f"verify.kills={self.kills} must be at least 1: verify.kills=3")
        if not self.signals or set(self.signals) - set(OWN_EXIT):
            raise ValueError(f"verify.signals={self.signals} must be of KILL, TERM, INT: 'verify.signals=[KILL,TERM]'")
        if not isinstance(self.seed, int):
            raise ValueError(f"verify.seed={self.seed} must be a whole number: verify.seed=0")


def find_problems(cfg: DictConfig) -> list[str]:
    found = problems_of_training(cfg)
    try:
        VerifyConfig(**OmegaConf.to_container(OmegaConf.create(cfg.verify or {})))
    except (TypeError, ValueError) as error:
        found.append(str(error))
    if not any("MetricsCSV" in str(logger.get("_target_")) for logger in cfg.logger.values()):
        found.append("logger must write metrics.csv, which is compared: logger=csv")
    for key, wanted in WANTED.items():
        if OmegaConf.select(cfg, key) != wanted:
            cure = "null" if wanted is None else str(wanted).lower()
            found.append(f"{key}={OmegaConf.select(cfg, key)} leaves nothing to resume or to compare: {key}={cure}")
    return found


def verify(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Train once undisturbed and once interrupted ``cfg.verify.kills`` times, both under ``folder``.

    Raises:
        ValueError: the two differ, with the first step that does; or a run failed by itself.
    """
    own = ("verify", "checkpoint.every_steps")
    overrides = [override for override in overrides if not override.lstrip("+").startswith(own)]
    every = "null" if cfg.checkpoint.every_steps is None else cfg.checkpoint.every_steps
    overrides.append(f"checkpoint.every_steps={every}")
    whole, cut = folder / "uninterrupted", folder / "interrupted"
    with _started([*overrides, f"hydra.run.dir={quoted(whole)}"], folder / "uninterrupted.log") as process:
        if process.wait() != 0:
            raise ValueError(f"the undisturbed run failed by itself: see {folder / 'uninterrupted.log'}")
    steps = read_record(whole)["optimizer_steps"]
    seconds_per_step = read_record(whole)["seconds"] / steps
    log.info("undisturbed: %d steps", steps)

    draw = random.Random(cfg.verify.seed)
    for number, target in enumerate(sorted(draw.choices(range(1, max(steps, 2)), k=cfg.verify.kills))):
        name = cfg.verify.signals[number % len(cfg.verify.signals)]
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
        completed = read_record(cut).get("status") == "completed"
        if status != OWN_EXIT[name] and not completed:
            raise ValueError(f"SIG{name} at step {seen}: exit status {status}: see {folder / 'interrupted.log'}")
        saved = _saved_step(cut)
        log.info("SIG%s at step %d: exit status %d, saved at step %d", name, seen, status, saved)
        logged = seen > (_attempts(cut) or [0])[-1]  # by this attempt, not by one before
        if name != "KILL" and not completed and logged and not 0 <= saved - seen <= cfg.trainer.log_every_n_steps:
            raise ValueError(f"SIG{name} at step {seen} was saved at step {saved}, not within one step")
    if read_record(cut).get("status") != "completed":
        with _started(_begin_or_resume(overrides, cut), folder / "interrupted.log") as process:
            if process.wait() != 0:
                raise ValueError(f"the resumed run failed by itself: see {folder / 'interrupted.log'}")
    if difference := first_difference(whole, cut):
        raise ValueError(f"not the same: {difference}: see {whole} and {cut}")
    log.info("bit-identical: %d steps, %d interruptions, losses, weights and optimizer", steps, cfg.verify.kills)


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
    place = "resume" if read_record(folder) else "hydra.run.dir"
    return [*([] if place == "resume" else overrides), f"{place}={quoted(folder)}"]


def _attempts(folder: Path) -> list[int]:
    """The steps at which processes began to train in ``folder``."""
    record = read_record(folder)
    return [0, *record.get("resumed_at", [])] if record else []


@contextmanager
def _started(arguments: list[str], output: Path) -> Iterator[subprocess.Popen]:
    with output.open("ab") as file:
        process = subprocess.Popen([sys.executable, "-m", "src.train", *arguments], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


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
    app.launch("verify_resume", _run, find_problems)
