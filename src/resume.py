"""Continuing a run: which one, with which overrides, and whether what is asked for can be its continuation."""

import logging
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import cli
from src.record import read_record
from src.training.config import ScheduleConfig
from src.training.interruption import Interrupted

log = logging.getLogger(__name__)

STATUSES = ("running", "interrupted", "failed", "completed")
FREE = ("drop_rate", "init")  # of the model: what a continued run may change


def resumed_overrides(overrides: list[str]) -> list[str]:
    """``overrides`` as given, or, with ``resume=<run folder>|latest`` among them, those of that run and theirs on top.

    A job that SLURM has put back into the queue resumes the run that it had begun.

    Raises:
        ValueError: no such run, or one whose overrides name code to execute.
    """
    flags = [argument for argument in overrides if argument[0] != "~" and (argument[0] == "-" or "=" not in argument)]
    new = [argument for argument in overrides if argument not in flags and _key(argument) != "resume"]
    given = [argument.split("=", 1)[-1].strip("'\"") for argument in overrides if _key(argument) == "resume"]
    sweeping = {"-m", "--multirun"} & set(flags)
    if not given and not sweeping and (begun := _requeued(new)):
        given, new = [str(begun)], []  # the same command, started again
    asked = given[-1] if given else None
    if asked in (None, "", "null"):
        return overrides
    if sweeping:
        raise ValueError(f"resume={asked} continues one run, not a sweep: leave -m away")
    folder = _latest(new) if asked == "latest" else Path(asked)
    record = read_record(folder)
    if not record:
        raise ValueError(f"resume={asked} is no run folder (seen from {Path.cwd()}), it has no run.json: resume=latest")
    saved = record.get("overrides")
    if not isinstance(saved, list) or not all(isinstance(override, str) for override in saved):
        raise ValueError(f"resume={folder}: its run.json is damaged: ckpt_path={folder}/checkpoints/last.ckpt")
    named = {_key(override) for override in new}
    if beginning := named & {"ckpt_path", "weights"}:
        raise ValueError(f"resume={asked} has its own beginning: leave {' and '.join(beginning)} away, or resume=null")
    named |= {"resume", "dry_run"}
    groups = tuple(f"{key}." for key in named)  # a group that is chosen anew brings its own values
    saved = [override for override in saved if _key(override) not in named and not _key(override).startswith(groups)]
    _refuse_code(saved, folder)
    attempts = len(record.get("resumed_at", [])) + 1
    places = [f"hydra.run.dir={quoted(folder)}", f"hydra.output_subdir=.hydra/resumed_{attempts}"]
    return [*flags, *saved, *new, f"resume={quoted(folder)}", *places]


def _refuse_code(saved: list[str], folder: Path) -> None:
    """A stranger's run folder is data: its overrides may choose among the code that ``conf`` names, and add none."""
    known = {target for file in cli.CONF.rglob("*.yaml") for target in _targets(OmegaConf.load(file))}
    for override in saved:
        if override.startswith("-") or _key(override).startswith("hydra") or "$" in override:
            raise ValueError(f"resume={folder} would bring {override} along: give it again if you trust it")
    try:
        foreign = set(_targets(cli.compose("train", saved))) - known
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"resume={folder}: its overrides do not compose any more ({reason}): ckpt_path=<its checkpoint>"
        ) from None
    if foreign:
        code = ", ".join(sorted(foreign))
        raise ValueError(f"resume={folder} would execute {code}: give the override that names it again if you trust it")


def _targets(cfg: DictConfig) -> list[str]:
    """Every ``_target_`` within ``cfg``."""
    found, nodes = [], [OmegaConf.to_container(cfg)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            found += [str(value) for key, value in node.items() if str(key) == "_target_"]
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    return found


def command_line(overrides: list[str]) -> str:
    return shlex.join(["python", "-m", "src.train", *overrides])


def command_to_resume(folder: Path) -> str:
    return command_line([f"resume={folder}"])


def different_model(cfg: DictConfig, model: dict[str, Any], path: Path) -> list[str]:
    """How the model asked for differs from the one of the checkpoint at ``path``, a line each."""
    return [
        f"model.{key}={OmegaConf.select(cfg.model, key)} differs from {value} in {path}: model.{key}={value}"
        for key, value in model.items()
        if key not in FREE and OmegaConf.select(cfg.model, key) != value
    ]


def different_values(cfg: DictConfig, checkpoint: dict[str, Any], path: Path) -> list[str]:
    """How the data or the geometry of the batches differs from that of the checkpoint at ``path``, a line each."""
    found = []
    defaults = {"data.stride": cfg.data.context_length, "trainer.limit_train_batches": 1.0}
    for key, value in checkpoint.get("fixed_values", {}).items():
        if key in ("tokenizer", "data_sha256"):  # known once the text is read
            continue
        asked = OmegaConf.select(cfg, key)
        asked = defaults.get(key) if asked is None else asked
        if asked != value:
            found.append(
                f"{key}={asked} differs from {value} in {path}: {key}={value}, or weights={path} for a new run"
            )
    return found


def check_text(checkpoint: dict[str, Any], path: Path, now: dict[str, Any]) -> None:
    """Whether the text and the tokenizer are those of the checkpoint at ``path``; otherwise a ValueError."""
    before = checkpoint.get("fixed_values", {})
    for key, what in ("data_sha256", "text"), ("tokenizer", "tokenizer"):
        if before.get(key, now[key]) != now[key]:
            raise ValueError(
                f"data.path: the {what} is not the one that {path} was trained on ({key} {now[key][:12]}, was "
                f"{before[key][:12]}): data.path=<that text>, or weights={path} for a new run on this one"
            )


def steps_of_schedule(cfg: DictConfig, checkpoint: dict[str, Any], steps: float) -> float:
    """The optimizer steps that the learning rate's curve is laid out over, in a run that makes ``steps`` in all.

    Raises:
        ValueError: a continued run has another length, and ``schedule.on_resume`` does not say what that means.
    """
    before = checkpoint.get("schedule_steps", steps)
    if cfg.schedule.name == "constant" or before == steps or cfg.schedule.on_resume == "stretch":
        return steps
    if cfg.schedule.on_resume == "keep":
        return before
    from src.training.optim import learning_rate_at

    config, peak, at = ScheduleConfig(**cfg.schedule), cfg.optimizer.learning_rate, checkpoint["global_step"]
    kept, last, stretched = (
        f"{learning_rate_at(step, total, peak, config):.2e}"
        for step, total in ((at, before), (before, before), (at, steps))
    )
    raise ValueError(
        f"the learning rate was laid out over {before:,} steps, the run is to make {steps:,}: schedule.on_resume=keep "
        f"(it goes on at {kept} and stays at {last} from step {before:,}) or schedule.on_resume=stretch (it goes on at "
        f"{stretched}, on a curve of {steps:,} steps)"
    )


def requeue(interrupted: Interrupted) -> None:
    """Put a SLURM job back into the queue whose time is almost up; it resumes by itself."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or interrupted.signal != getattr(signal, "SIGUSR1", None):
        return
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
        log.info("SLURM job %s is back in the queue", job)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("SLURM job %s could not be put back into the queue: %s", job, getattr(error, "stderr", "") or error)


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~").split("@")[0]


def quoted(path: Path) -> str:
    """``path`` as the value of an override."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _runs() -> list[Path]:
    records = [*Path("outputs").glob("*/*/run.json"), *Path("outputs").glob("*/*/*/run.json")]
    runs = [record.parent for record in sorted(records, key=lambda record: record.stat().st_mtime, reverse=True)]
    return [run for run in runs if not run.parent.name.endswith("_verify")]  # those belong to src.verify_resume


def _latest(overrides: list[str]) -> Path:
    """The run that was changed last, those with a checkpoint before others; of the name that is asked for."""
    names = [override.split("=", 1)[1] for override in overrides if _key(override) == "name"]
    runs = [
        run for run in _runs() if read_record(run).get("status") in STATUSES and (not names or run.parts[1] in names)
    ]
    runs.sort(key=lambda run: not any(run.glob("checkpoints/*.ckpt")))
    if not runs:
        place = Path.cwd() / "outputs" / "".join(names[-1:])
        raise ValueError(f"resume=latest: there is no run in {place}: resume=<run folder>")
    return runs[0]


def _requeued(overrides: list[str]) -> Path | None:
    """The unfinished run of this very command that an earlier start of this SLURM job began."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    own = [override.split("=", 1)[1] for override in overrides if _key(override) == "hydra.run.dir"]
    command = command_line([override for override in overrides if not _key(override).startswith("hydra")])
    for run in [*map(Path, own), *_runs()]:
        record = read_record(run)
        if record.get("slurm_job") == job and record["command"] == command and record["status"] != "completed":
            return run
    return None
