"""Which run a command refers to: the latest one, the one of some weights, or the one of a requeued job."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src.cli.quoting import command_line, key_of, quoted
from src.files import expanded
from src.interop.locate import run_folder
from src.runs.processes import job_id, restarted
from src.runs.record import read_record, recorded_runs

STATUSES = ("running", "interrupted", "failed", "oom", "completed")


def latest_run(key: str, overrides: Iterable[str] = ()) -> Path:
    """The folder of the run that changed last, of the ``name`` in ``overrides`` if there is one; runs with a checkpoint
    come before all others. ``key`` is the override that asked for it.

    Raises:
        ValueError: there is no run.
    """
    names = [override.split("=", 1)[1] for override in overrides if key_of(override) == "name"]
    runs = [
        run
        for run in recorded_runs()
        if read_record(run).get("status") in STATUSES and (not names or run.parts[1] in names)
    ]
    runs.sort(key=lambda run: not any(run.glob("checkpoints/*.ckpt")))
    if not runs:
        place = Path.cwd() / "outputs" / "".join(names[-1:])
        raise ValueError(f"{key}=latest finds no run in {place}; use {key}=<run folder>")
    return runs[0]


def requeued_run(overrides: list[str]) -> Path | None:
    """The unfinished run of a command with ``overrides`` that an earlier start of this job, by SLURM or torchrun,
    began."""
    job = job_id()
    if job is None or not (restarted() or int(os.environ.get("SLURM_RESTART_COUNT", "0"))):
        return None
    given = [override.split("=", 1)[1] for override in overrides if key_of(override) == "hydra.run.dir"]
    command = command_line(without_hydra(overrides))
    for run in [*map(Path, given), *recorded_runs()]:
        record = read_record(run)
        if record.get("job_id") == job and record.get("command") == command and record.get("status") != "completed":
            return run
    return None


def with_latest_weights(overrides: list[str]) -> list[str]:
    """``overrides`` with ``latest`` in ``weights`` replaced by the folder of the latest run, and paths quoted.

    Raises:
        ValueError: there is no run.
    """

    def replaced(override: str) -> str:
        key, _, value = override.partition("=")
        parts = value.split(",")
        if key.lstrip("+") != "weights":
            return override
        if "latest" not in parts:  # a path is taken literally, whatever Hydra's grammar makes of its characters
            plain = re.fullmatch(r"[\w./:+@%~-]*", value) or not os.path.lexists(os.path.expanduser(value))
            return override if plain else f"{key}={quoted(value)}"
        return f"{key}={','.join(quoted(latest_run('weights')) if part == 'latest' else part for part in parts)}"

    return [replaced(override) for override in overrides]


def data_of_run(weights: str) -> dict[str, Any]:
    """The data section of the run that wrote ``weights``, from its ``run.json`` or else from the checkpoint; empty if
    they do not belong to a run."""
    folder, file = run_folder(weights), expanded(weights)
    if folder and file.is_dir():
        file = next(folder.glob("checkpoints/*.ckpt"), file)
    config = read_record(folder).get("config") if folder else None
    data = config.get("data") if isinstance(config, dict) else None
    if data is None and file.suffix == ".ckpt" and file.exists():
        from src.checkpoint.parts import read_file_or_parts  # imports PyTorch

        content = read_file_or_parts(file, "weights", unsealed=True, kinds=())
        run = content.get("run") if isinstance(content, dict) else None
        data = run.get("data") if isinstance(run, dict) else None
    return data if isinstance(data, dict) else {}


def without_hydra(overrides: list[str]) -> list[str]:
    """``overrides`` without those of Hydra's own keys, which do not change what is trained."""
    return [override for override in overrides if not key_of(override).startswith("hydra")]
