"""Continuing a run: which one, and with which overrides."""

import logging
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.checkpoint.interruption import Interrupted
from src.cli.overrides import CONF, compose
from src.interop.locate import run_folder
from src.runs.record import read_record, signature

log = logging.getLogger(__name__)

COMMAND = "GPT2_LIGHTNING_COMMAND"  # in the environment: what was typed, before it was spelt out
COPY = "ckpt_path=<a copy of its last.ckpt in another folder>, which brings no overrides along"
STATUSES = ("running", "interrupted", "failed", "completed")


def resumed_overrides(overrides: list[str]) -> list[str]:
    """What the overrides of ``src.train`` stand for: with ``resume=<run folder>|latest`` or ``ckpt_path=<checkpoint or
    run folder>|latest`` among them, those of that run, and the given ones on top; ``latest`` is a run folder.

    A job that SLURM has put back into the queue resumes the run that it had begun.

    Raises:
        ValueError: no such run, or one of somebody else whose overrides name code to execute.
    """
    flags, typed, given = _taken_apart(overrides, "resume")
    sweeping = {"-m", "--multirun"} & set(flags)
    os.environ[COMMAND] = "" if sweeping else command_line(_without_hydra(typed))
    new = typed
    if not given and not sweeping and (begun := _requeued(new)):
        given, new = [str(begun)], []  # the same command, started again
    asked = given[-1] if given else None
    if asked in (None, "", "null"):
        return _from_checkpoint(with_latest_weights(overrides))
    if sweeping:
        raise ValueError(f"resume={asked} continues one run, not a sweep: leave -m away")
    folder = _latest("resume", new) if asked == "latest" else Path(asked)
    record = read_record(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"resume={asked} is no run folder (seen from {Path.cwd()}), it has no run.json: resume=latest")
    if _overrides_in(record) is None:
        raise ValueError(f"resume={folder}: its run.json is damaged: ckpt_path={folder}/checkpoints/last.ckpt")
    if beginning := {_key(override) for override in new} & {"ckpt_path", "weights"}:
        raise ValueError(f"resume={asked} has its own beginning: leave {' and '.join(beginning)} away, or resume=null")
    saved = _saved_overrides(record, f"resume={folder}", new, typed)
    attempts = len(record.get("resumed_at", [])) + 1
    places = [f"hydra.run.dir={quoted(folder)}", f"hydra.output_subdir=.hydra/resumed_{attempts}"]
    return [*flags, *saved, *new, f"resume={quoted(folder)}", *places]


def _from_checkpoint(overrides: list[str]) -> list[str]:
    """``overrides``, those of the run before them whose checkpoint ``ckpt_path`` names, if they name one."""
    flags, new, given = _taken_apart(overrides, "ckpt_path")
    if not given or not (given[-1] == "latest" or os.path.exists(given[-1])):
        return overrides
    asked = f"ckpt_path={given[-1]}"
    path = _latest("ckpt_path") if given[-1] == "latest" else Path(given[-1])
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = sorted(folder.glob("*.ckpt"), key=lambda file: (file.name == "last.ckpt", file.stat().st_mtime))
        if not found:
            raise ValueError(f"{asked}: there is no checkpoint in {folder}: ckpt_path=<another run folder>")
        path = found[-1]
    run = run_folder(str(path))
    record = read_record(run) if run else {}
    if run and _overrides_in(record) is None:
        log.warning("%s: the run.json of its run is damaged, its overrides are not brought along", asked)
        run = None
    saved = _saved_overrides(record, asked, new, new, drop=("weights", "ckpt_path")) if run else []
    return [*flags, *saved, *new, f"ckpt_path={quoted(path)}"]


def with_latest_weights(overrides: list[str]) -> list[str]:
    """``overrides`` with the folder of the run that was changed last for ``latest`` in ``weights``.

    Raises:
        ValueError: there is no run.
    """

    def spelt_out(override: str) -> str:
        key, _, value = override.partition("=")
        parts = value.split(",")
        if key.lstrip("+") != "weights" or "latest" not in parts:
            return override
        return f"{key}={','.join(quoted(_latest('weights')) if part == 'latest' else part for part in parts)}"

    return [spelt_out(override) for override in overrides]


def data_of_run(weights: str) -> dict[str, Any]:
    """The data section of the run that ``weights`` are of, as its ``run.json`` has it, or else the checkpoint itself;
    nothing where they are no run's."""
    folder, file = run_folder(weights), Path(os.path.expanduser(weights))
    config = read_record(folder).get("config") if folder else None
    data = config.get("data") if isinstance(config, dict) else None
    if data is None and file.suffix == ".ckpt" and file.is_file():
        from src.checkpoint.sealed import read_sealed  # imports PyTorch

        content = read_sealed(file, "weights", unsealed=True)
        run = content.get("run") if isinstance(content, dict) else None
        data = run.get("data") if isinstance(run, dict) else None
    return data if isinstance(data, dict) else {}


def _overrides_in(record: dict[str, Any]) -> list[str] | None:
    saved = record.get("overrides")
    return saved if isinstance(saved, list) and all(isinstance(override, str) for override in saved) else None


def _saved_overrides(
    record: dict[str, Any], asked: str, new: list[str], typed: list[str], drop: tuple[str, ...] = ()
) -> list[str]:
    """The overrides in the ``record`` of a run that ``new`` ones go on top of, if they may be trusted."""
    saved = _overrides_in(record)
    own = record.get("signature") == signature(saved) is not None
    named = {_key(override) for override in new} | {"resume", "dry_run", *drop}
    groups = tuple(f"{key}." for key in named)  # a group that is chosen anew brings its own values
    again = {_key(override) for override in new if not override.startswith("+")}  # of what + has added
    saved = [
        override
        for override in saved
        if not (_key(override) in named or _key(override).startswith(groups))
        or (override.startswith("+") and _key(override) in again)
    ]
    if not own and not set(saved) <= set(typed):
        _refuse_code(saved, asked)
    return saved


def _refuse_code(saved: list[str], asked: str) -> None:
    """A stranger's run folder is data: its overrides may choose among the code that ``conf`` names, and add none."""
    known = {target for file in CONF.rglob("*.yaml") for target in _targets(OmegaConf.load(file))}
    for override in saved:
        if override.startswith("-") or _key(override).startswith("hydra") or "$" in override:
            raise ValueError(f"{asked} would bring {override} along: give it again if you trust it")
    try:
        foreign = set(_targets(compose("train", saved))) - known
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{asked}: its overrides do not compose any more ({reason}): {COPY}") from None
    if foreign:
        code = ", ".join(sorted(foreign))
        raise ValueError(f"{asked} would execute {code}: give the override that names it again if you trust it")


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


def _without_hydra(overrides: list[str]) -> list[str]:
    return [override for override in overrides if not _key(override).startswith("hydra")]


def resume_override(folder: Path) -> str:
    """The override that continues the run in ``folder``, quoted for a shell."""
    return shlex.quote(f"resume={as_typed(folder)}")


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


def _taken_apart(overrides: list[str], key: str) -> tuple[list[str], list[str], list[str]]:
    """Hydra's own flags, the overrides but for ``key``, and the values that ``key`` was given."""
    flags = [override for override in overrides if "=" not in override and not override.startswith("~")]
    rest = [override for override in overrides if override not in flags and _key(override) != key]
    values = [as_meant(override.split("=", 1)[-1]) for override in overrides if _key(override) == key]
    return flags, rest, values


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~").split("@")[0]


def quoted(path: Path) -> str:
    """``path`` as the value of an override: in quotes for Hydra's grammar, no interpolation for OmegaConf."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(path))
    return QuotedString(text, Quote.single).with_quotes()


def as_typed(folder: Path) -> str:
    """``folder`` as the value of ``resume=``, which takes any text to the letter but for one in quotes."""
    return quoted(folder) if str(folder)[:1] in ("'", '"') else str(folder)


def as_meant(text: str) -> str:
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        with suppress(HydraException, OmegaConfBaseException):
            value = OverridesParser.create().parse_override(f"resume={text}").value()
            return str(OmegaConf.create({"resume": value}).resume)
    return text


def _runs() -> list[Path]:
    records = [*Path("outputs").glob("*/*/run.json"), *Path("outputs").glob("*/*/*/run.json")]
    runs = [record.parent for record in sorted(records, key=lambda record: record.stat().st_mtime, reverse=True)]
    return [run for run in runs if not run.parent.name.endswith("_verify")]  # those belong to src.verify_resume


def _latest(key: str, overrides: Iterable[str] = ()) -> Path:
    """The run that was changed last, those with a checkpoint before others; of the name that is asked for."""
    names = [override.split("=", 1)[1] for override in overrides if _key(override) == "name"]
    runs = [
        run for run in _runs() if read_record(run).get("status") in STATUSES and (not names or run.parts[1] in names)
    ]
    runs.sort(key=lambda run: not any(run.glob("checkpoints/*.ckpt")))
    if not runs:
        place = Path.cwd() / "outputs" / "".join(names[-1:])
        raise ValueError(f"{key}=latest: there is no run in {place}: {key}=<run folder>")
    return runs[0]


def _requeued(overrides: list[str]) -> Path | None:
    """The unfinished run of this very command that an earlier start of this SLURM job began."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    own = [override.split("=", 1)[1] for override in overrides if _key(override) == "hydra.run.dir"]
    command = command_line(_without_hydra(overrides))
    for run in [*map(Path, own), *_runs()]:
        record = read_record(run)
        if record.get("slurm_job") == job and record.get("command") == command and record.get("status") != "completed":
            return run
    return None
