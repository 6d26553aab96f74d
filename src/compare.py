"""Runs side by side: ``python -m src.compare <runs, sweeps or globs>``. See ``conf/compare.yaml``."""

from __future__ import annotations

import glob
import math
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pydantic import Field

from src.cli import app
from src.cli.latest import latest_run
from src.cli.quoting import quoted
from src.cli.typed import typed
from src.config import Config, problems_of, refuse
from src.files import expanded
from src.runs.compare import BITS, compared_column, differences, figure_of, jobs_of, read_run, rows_of
from src.runs.tables import cell, in_columns, write_table


class CompareConfig(Config):
    """The keys of ``conf/compare.yaml``, which explains them."""

    runs: tuple[str, ...] = Field(min_length=1, examples=["[outputs/gpt2/*]"])
    output: str


def check(cfg: DictConfig) -> tuple[list[Path], Path]:
    """The run folders that ``cfg`` names, and the folder for what is written.

    Raises:
        ValueError: every problem, one per line.
    """
    config = typed(cfg, CompareConfig)
    found: dict[Path, None] = {}
    problems = []
    for asked in config.runs:
        path = expanded(asked)
        path = latest_run("runs") if asked == "latest" else path
        folders = [path] if path.is_dir() else [Path(match) for match in sorted(glob.glob(str(path)))]
        folders += [sweep.parent for folder in folders for sweep in folder.glob("*/sweep.json")]
        runs = [run for folder in folders for run in (folder, *jobs_of(folder)) if (run / "run.json").is_file()]
        found |= dict.fromkeys(run.resolve() for run in runs)
        if not runs:
            problems.append(
                f"runs={asked} is no run, no sweep and no pattern of them (seen from {Path.cwd()}); "
                f"use python -m src.compare <run folders>"
            )
    output = expanded(config.output)
    refuse([*problems, *problems_of(app.check_output, output)])
    return list(found), output


def compare(cfg: DictConfig) -> list[dict[str, Any]]:
    """Print the table and the differences, write table and figure, and return the rows, the best first.

    Raises:
        ValueError: the problems of the config.
    """
    folders, output = check(cfg)
    above = os.path.commonpath([folder.parent for folder in folders])
    runs = [read_run(folder, os.path.relpath(folder, above)) for folder in folders]
    by = "best_bits_per_byte" if compared_column(runs) == BITS else "best_val_loss"
    best = {run.name: run.results()[by] for run in runs}
    runs.sort(key=lambda run: math.inf if best[run.name] is None else best[run.name])
    rows = rows_of(runs)
    shown = [{key: value for key, value in row.items() if key != "checkpoint"} for row in rows]
    print("\n".join(in_columns(shown, shutil.get_terminal_size().columns)))
    for key, groups in differences(runs).items():
        values = (
            f"{cell(key, group[0].settings.get(key))} ({', '.join(run.name for run in group)})" for group in groups
        )
        print(f"{key}: {'; '.join(values)}")
    if by == "best_bits_per_byte":
        print("the tokenizers differ, so losses per token do not compare: sorted and drawn by bits per byte")
    if len({run.record.get("data_sha256") for run in runs} - {None}) > 1:
        print("the texts differ")
    if missing := [run.name for run in runs if not run.metrics]:
        print(f"without rows in metrics.csv, so without curves: {', '.join(missing)}")
    output.mkdir(parents=True, exist_ok=True)
    write_table(rows, output / "compare")
    figure_of(runs).savefig(output / "compare.png")
    print(f"{output}: compare.csv, compare.md, compare.png")
    return rows


def with_runs(arguments: list[str]) -> list[str]:
    """``arguments`` with ``runs=`` in place of those that are no override."""
    plain = [each for each in arguments if not each.startswith("-") and ("=" not in each or os.path.lexists(each))]
    if not arguments:
        raise ValueError("runs is needed; use python -m src.compare <run folder> <run folder>")
    if not plain:
        return arguments
    return [*(each for each in arguments if each not in plain), f"runs=[{','.join(map(quoted, plain))}]"]


if __name__ == "__main__":
    app.launch("compare", compare, check, with_runs)
