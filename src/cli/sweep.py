"""A sweep: its table, its record, and how it is continued."""

import logging
import math
import os
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from src.cli import app
from src.cli.overrides import compose
from src.cli.quoting import key_of, quoted, split_overrides
from src.cli.resume import COMMAND, overrides_in, resumed_overrides
from src.files import read_json, remove_folder, write_json
from src.runs.compare import ComparedRun, figure_of, jobs_of, read_run, rows_of
from src.runs.record import is_signed, signature
from src.runs.tables import write_table

log = logging.getLogger(__name__)

KEY = "sweep.resume"
OWN = (KEY, "hydra.mode", "hydra.sweep.dir", "hydra.output_subdir")  # what a sweep that is continued sets itself


class SweepTable(Callback):
    """Prints a row per job of a sweep, the lowest loss first, and fails the sweep if a job failed.

    ``columns`` maps the heading of each column to a key of the job's file ``record``; the first column sorts the rows.
    A sweep of runs (``run.json``) can be continued, and keeps its table and a figure in its folder.
    """

    def __init__(self, record: str = "run.json", columns: dict[str, str] | None = None) -> None:
        self.record = record
        self.columns = dict(columns or {"val loss": "val_loss"})

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.record == "run.json":
            folder = Path(config.hydra.sweep.dir)
            folder.mkdir(parents=True, exist_ok=True)
            _claim(folder)
            typed = [*config.hydra.overrides.task, *config.hydra.overrides.hydra]
            overrides = [override for override in typed if key_of(override) not in OWN]
            write_json(folder / "sweep.json", {"overrides": overrides, "signature": signature(overrides)})

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = [(job, *self._outcome(job)) for job in jobs_of(folder)]
        rows.sort(key=lambda row: row[1][0])
        print("\n" + "".join(f"{heading:>10}  " for heading in self.columns) + f"{'status':<10}  {'job':<4}  overrides")
        for job, numbers, status, overrides in rows:
            shown = "".join(f"{number if math.isfinite(number) else '-':>10.6}  " for number in numbers)
            print(f"{shown}{status:<10}  {job.name:<4}  {overrides}")
        for job in (job for job, _, status, _ in rows if status == "checked"):  # a dry run leaves nothing
            shutil.rmtree(job)
        if any(folder.glob("*/")):
            runs = write_sweep(folder) if self.record == "run.json" else []
            if any(run.metrics for run in runs):
                (folder / "plots").mkdir(exist_ok=True)
                figure_of(runs).savefig(folder / "plots" / "sweep.png")
            print(f"sweep folder: {folder}")
        else:
            remove_folder(folder, "multirun.yaml", "sweep.*", ".lock", ".table.lock")
        if any(status not in ("completed", "checked") for _, _, status, _ in rows):
            raise SystemExit(1)

    def _outcome(self, job: Path) -> tuple[list[float], str, str]:
        record = read_json(job / self.record)
        found = [record.get(key) for key in self.columns.values()]
        numbers: list[float] = [number if isinstance(number, int | float) else math.inf for number in found]
        return numbers, str(record.get("status", "failed")), " ".join(_overrides_of(job))


def write_sweep(folder: Path) -> list[ComparedRun]:
    """Write ``sweep.csv`` and ``sweep.md``, a row per job, the lowest final loss first; returns the jobs."""
    runs = [
        read_run(job, job.name, {key_of(override): override.split("=", 1)[-1] for override in _overrides_of(job)})
        for job in jobs_of(folder)
    ]
    runs.sort(key=lambda run: run.record.get("val_loss", math.inf))
    if runs:
        with FileLock(folder / ".table.lock"):  # jobs may end at the same time
            write_table(rows_of(runs), folder / "sweep")
    return runs


def _overrides_of(job: Path) -> list[str]:
    with suppress(OSError, ValueError, YAMLError):
        return [str(override) for override in OmegaConf.load(job / ".hydra" / "overrides.yaml")]
    return []


@cache  # the lock is held until this process ends
def _claim(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        app.fail([f"{folder} is in use by another process; stop that, or use hydra.sweep.dir=<a new folder>"])
    return lock


def resumed_sweep(overrides: list[str]) -> list[str]:
    """The overrides to compose for the ``overrides`` of ``src.train``: those of the sweep that ``-m sweep.resume=``
    names and the given ones, or else as :func:`~src.cli.resume.resumed_overrides` says.

    Raises:
        ValueError: there is no such sweep, it cannot be continued, or another user wrote its overrides.
    """
    flags, typed, given = split_overrides(overrides, KEY)
    asked = f"{KEY}={given[-1]}" if given else ""
    if not given or given[-1] in ("", "null"):
        return resumed_overrides(overrides)
    if not {"-m", "--multirun"} & set(flags):
        raise ValueError(f"{asked} continues a sweep; use -m {asked}")
    os.environ[COMMAND] = ""
    folder = Path(given[-1])
    record = read_json(folder / "sweep.json")
    saved = overrides_in(record)
    if saved is None:
        raise ValueError(
            f"{asked} is not the folder of a sweep (seen from {Path.cwd()}), it has no valid sweep.json; "
            f"use {KEY}=outputs/gpt2/<time>_sweep, or resume=<run folder> without -m"
        )
    if not (is_signed(record, saved) or set(saved) <= set(typed)):
        raise ValueError(f"{asked} has overrides of another user in sweep.json; type them again if you trust them")
    new = [override for override in typed if override not in saved]
    fixed = [override for override in saved if not _sweeps(override)]
    params = compose("train", fixed, return_hydra_config=True).hydra.sweeper.get("params") or {}
    swept = {key_of(override) for override in saved if _sweeps(override)} | {"experiment", *map(str, params)}
    for override in new:
        if _sweeps(override) or key_of(override) in {*swept, *OWN}:
            raise ValueError(f"{override} would change the jobs of the sweep; leave it out with {asked}")
    if sweepers := [each for each in [*saved, *new] if key_of(each) == "hydra/sweeper" and not each.endswith("=basic")]:
        raise ValueError(
            f"{asked} was made with {sweepers[-1]}, which may number its jobs in another way; use a new sweep"
        )
    own = [f"{KEY}={quoted(folder)}", f"hydra.sweep.dir={quoted(folder)}", "hydra.output_subdir=null"]
    return [*flags, *saved, *new, *own]


def _sweeps(override: str) -> bool:
    with suppress(HydraException):
        return OverridesParser.create().parse_override(override).is_sweep_override()
    return False
