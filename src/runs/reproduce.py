"""``reproduce=<run folder>``: what differs from the run that is trained again, and whether the numbers are the same."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from src.files import read_rows
from src.runs.record import RunRecord, git_diff, read_record
from src.runs.report import changes
from src.training.config import TrainConfig

log = logging.getLogger(__name__)

Row = dict[str, str]  # column: what metrics.csv holds, whose numbers read back to the same bits


def print_differences(config: TrainConfig, record: RunRecord) -> None:
    """Print and record what the run that ``record`` describes has other than the one it reproduces, if it does."""
    if config.reproduce is None:
        return
    found = differences(Path(config.reproduce), record.values)
    record.update(reproduces={"run": config.reproduce, "differences": found})
    for difference in found:
        log.info("differs from %s: %s", config.reproduce, difference)
    if not found:
        log.info("no differences from %s in config, code, versions, device and text", config.reproduce)


def print_outcome(config: TrainConfig, record: RunRecord) -> None:
    """Compare the numbers of both runs, and print and record the outcome."""
    if config.reproduce is None:
        return
    outcome = compare(Path(config.reproduce), record.path.parent)
    record.update(reproduces={**record.values["reproduces"], "outcome": outcome})
    log.log(logging.INFO if outcome.startswith("reproduced") else logging.WARNING, "%s", outcome)


def differences(folder: Path, now: dict[str, Any]) -> list[str]:
    """What differs between the record of the run in ``folder`` and the record ``now``."""
    before = read_record(folder)
    found = [f"config: {change}" for change in changes(before, now["config"])]
    for group in ("callbacks", "logger"):
        if before.get("config", {}).get(group) != now["config"][group]:
            found.append(f"config: another {group}")
    found += code_differences(before.get("git"), folder / "code.diff")
    old, new = before.get("versions", {}), now["versions"]
    found += [
        f"version: {name} {new.get(name)}, was {old.get(name)}"
        for name in sorted({*old, *new})
        if new.get(name) != old.get(name)
    ]
    for key in ("device", "precision", "data_sha256"):  # the device's name has the number of threads
        if before.get(key) != now[key]:
            found.append(f"{key}: {now[key]}, was {before.get(key)}")
    return found


def code_differences(revision: str | None, diff: Path) -> list[str]:
    """The files in ``src`` and ``conf`` that are not what they were in a run at ``revision``, whose own changes are in
    the file ``diff``."""
    commit = (revision or "").removesuffix("-dirty")
    if not re.fullmatch("[0-9a-f]{40,64}", commit):
        return ["code: unknown, the run was not made in a repository"]
    if (changed := git_diff(commit)) is None:
        return [f"code: unknown, the revision {commit} of the run is not in this repository"]
    then = _by_file(diff.read_text(encoding="utf-8", errors="replace") if diff.is_file() else "")
    now = _by_file(changed)
    return [f"code: {file}" for file in sorted({*then, *now}) if then.get(file) != now.get(file)]


def _by_file(diff: str) -> dict[str, str]:
    """The part of a ``diff`` that concerns each file."""
    parts = re.split(r"^diff --git .*? b/(.*)\n", diff, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def compare(old: Path, new: Path) -> str:
    """Whether the run in ``new`` logged what the run in ``old`` had, apart from its speed: a sentence that begins with
    ``reproduced``, or that names the first step and column with another value. Where ``old`` was not completed, its
    values are the only ones compared; without ``metrics.csv`` the final losses are."""
    completed = read_record(old).get("status") == "completed"
    before, after = _rows(old), _rows(new)
    where = f"of the {len(before):,} rows of metrics.csv"
    if not before or not after:
        before, after, where = _losses(old), _losses(new), "of the final losses in run.json"
    last = max(before, default=-1)
    count = 0
    for step in sorted(step for step in {*before, *after} if step <= last):
        was, now = before.get(step, {}), after.get(step, {})
        for column in {**was, **(now if completed else {})}:
            if was.get(column) != now.get(column):
                values = f"{now.get(column, 'missing')}, was {was.get(column, 'missing')}"
                return f"{old} is not reproduced: from step {step}, {column} is {values}"
            count += 1
    if not count:
        return f"{old} has no numbers to compare"
    return f"reproduced {old}: all {count:,} values {where} are identical"


def _rows(folder: Path) -> dict[int, Row]:
    """The rows of ``metrics.csv`` by step, without speeds and empty cells."""
    return {
        int(row["step"]): {
            key: value for key, value in row.items() if value and key != "step" and not key.startswith("perf/")
        }
        for row in read_rows(folder / "metrics.csv")[0]
    }


def _losses(folder: Path) -> dict[int, Row]:
    record = read_record(folder)
    losses = {key: repr(record[key]) for key in ("train_loss", "val_loss") if record.get(key) is not None}
    return {record.get("optimizer_steps", 0): losses} if losses else {}
