"""Continuing a run: which one, and with which overrides."""

import logging
import os
import re
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import cli
from src.record import read_record
from src.training.interruption import Interrupted

log = logging.getLogger(__name__)

STATUSES = ("running", "interrupted", "failed", "completed")


def resumed_overrides(overrides: list[str]) -> list[str]:
    """``overrides`` as given, or, with ``resume=<run folder>|latest`` among them, those of that run and theirs on top.

    A job that SLURM has put back into the queue resumes the run that it had begun.

    Raises:
        ValueError: no such run, or one whose overrides name code to execute.
    """
    flags = [argument for argument in overrides if "=" not in argument and not argument.startswith("~")]  # Hydra's own
    new = [argument for argument in overrides if argument not in flags and _key(argument) != "resume"]
    given = [_as_meant(argument.split("=", 1)[-1]) for argument in overrides if _key(argument) == "resume"]
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
    if not (folder / "run.json").is_file():
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
    return command_line([f"resume={as_typed(folder)}"])


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
    """``path`` as the value of an override: in quotes for Hydra's grammar, no interpolation for OmegaConf."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(path))
    return QuotedString(text, Quote.single).with_quotes()


def as_typed(folder: Path) -> str:
    """``folder`` as the value of ``resume=``, which takes any text to the letter but for one in quotes."""
    return quoted(folder) if str(folder)[:1] in ("'", '"') else str(folder)


def _as_meant(text: str) -> str:
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        with suppress(HydraException, OmegaConfBaseException):
            value = OverridesParser.create().parse_override(f"resume={text}").value()
            return str(OmegaConf.create({"resume": value}).resume)
    return text


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
        if record.get("slurm_job") == job and record.get("command") == command and record.get("status") != "completed":
            return run
    return None
