"""The overrides of a run that is continued or reproduced."""

import logging
import os
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.checkpoint.pickles import is_in_parts
from src.cli.latest import latest_run, requeued_run, with_latest_weights, without_hydra
from src.cli.overrides import CONF, compose
from src.cli.quoting import command_line, key_of, quoted, split_overrides
from src.interop.locate import run_folder
from src.runs.record import is_signed, read_record

log = logging.getLogger(__name__)

COMMAND = "GPT2_LIGHTNING_COMMAND"  # in the environment: the command as typed, without the overrides of its run


def resumed_overrides(overrides: list[str]) -> list[str]:
    """The overrides to compose for the ``overrides`` of ``src.train``.

    ``resume=<run folder>|latest``, ``reproduce=<run folder>|latest`` or ``ckpt_path=<checkpoint or run folder>|latest``
    puts the overrides of that run before the given ones. A job that was started again resumes the run it began.

    Raises:
        ValueError: there is no such run, or its overrides name code to execute and another user wrote them.
    """
    flags, typed, given = split_overrides(overrides, "resume")
    sweeping = {"-m", "--multirun"} & set(flags)
    os.environ[COMMAND] = "" if sweeping else command_line(without_hydra(typed))
    if begun := None if given or sweeping else requeued_run(typed):
        given = [str(begun)]
    new = [] if begun else typed  # the same command, started again
    if (asked := given[-1] if given else "") in ("", "null"):
        return _reproduced(overrides) or _from_checkpoint(with_latest_weights(overrides))
    if sweeping:
        raise ValueError(f"resume={asked} continues one run and cannot be part of a sweep; leave out -m")
    folder, record = _run("resume", asked, new)
    if starts := {key_of(override) for override in new} & {"ckpt_path", "weights", "reproduce"}:
        raise ValueError(
            f"resume={asked} starts from its own checkpoint; leave out {' and '.join(starts)}, or use resume=null"
        )
    in_checkpoint = ("skip_batches",) if any(folder.glob("checkpoints/*.ckpt")) else ()
    saved = _saved_overrides(record, f"resume={folder}", new, typed, drop=in_checkpoint)
    dry_run = any(key_of(one) == "dry_run" and not one.endswith(("=false", "=null")) for one in new)
    place = "null" if dry_run else f".hydra/resumed_{len(record.get('resumed_at', [])) + 1}"
    own = [f"{key}={quoted(folder)}" for key in ("resume", "hydra.run.dir")]
    return [*flags, *saved, *new, *own, f"hydra.output_subdir={place}"]


def _run(key: str, asked: str, new: list[str]) -> tuple[Path, dict[str, Any]]:
    """The run folder that ``<key>=<asked>`` names, with the overrides ``new``, and its record."""
    folder = latest_run(key, new) if asked == "latest" else Path(asked)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{key}={asked} is not a run folder (seen from {Path.cwd()}); use {key}=latest")
    if overrides_in(record := read_record(folder)) is None:
        cure = f"ckpt_path={folder}/checkpoints/last.ckpt" if key == "resume" else f"{key}=<another run folder>"
        raise ValueError(f"{key}={folder} has a damaged run.json; use {cure}")
    return folder, record


def _reproduced(overrides: list[str]) -> list[str]:
    """``overrides``, after those of the run that ``reproduce`` names; none if it names none."""
    flags, new, given = split_overrides(overrides, "reproduce")
    if not given or given[-1] in ("", "null"):
        return []
    folder, record = _run("reproduce", given[-1], new)
    saved = _saved_overrides(record, f"reproduce={folder}", new, new, drop=("reproduce",))
    batch = record.get("config", {}).get("data", {}).get("batch_size")  # as auto found it then
    saved = [f"data.batch_size={batch}" if one == "data.batch_size=auto" else one for one in saved]
    return [*flags, *saved, *with_latest_weights(new), f"reproduce={quoted(folder)}"]


def _from_checkpoint(overrides: list[str]) -> list[str]:
    """``overrides``, after those of the run whose checkpoint ``ckpt_path`` names, if it names one."""
    flags, new, given = split_overrides(overrides, "ckpt_path")
    if not given or not (given[-1] == "latest" or os.path.exists(given[-1])):
        return overrides
    asked = f"ckpt_path={given[-1]}"
    path = latest_run("ckpt_path") if given[-1] == "latest" else Path(given[-1])
    if path.is_dir() and not is_in_parts(path):
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = sorted(folder.glob("*.ckpt"), key=lambda file: (file.name == "last.ckpt", file.stat().st_mtime))
        if not found:
            raise ValueError(f"{asked} has no checkpoint in {folder}; use ckpt_path=<another run folder>")
        path = found[-1]
    run = run_folder(str(path))
    record = read_record(run) if run else {}
    if run and overrides_in(record) is None:
        log.warning("%s: the run.json of its run is damaged, the overrides of that run are not used", asked)
        run = None
    drop = ("weights", "ckpt_path", "reproduce", "skip_batches")
    saved = _saved_overrides(record, asked, new, new, drop) if run else []
    return [*flags, *saved, *new, f"ckpt_path={quoted(path)}"]


def overrides_in(record: dict[str, Any]) -> list[str] | None:
    saved = record.get("overrides")
    return saved if isinstance(saved, list) and all(isinstance(override, str) for override in saved) else None


def _saved_overrides(
    record: dict[str, Any], asked: str, new: list[str], typed: list[str], drop: tuple[str, ...] = ()
) -> list[str]:
    """The overrides in the ``record`` of a run that ``new`` ones do not replace, if they can be trusted: this user
    signed them, or has typed them again."""
    saved = overrides_in(record) or []
    own = is_signed(record, saved)
    named = {key_of(override) for override in new} | {"resume", "dry_run", *drop}
    groups = tuple(f"{key}." for key in named)  # a group that is chosen again comes with its own values
    set_again = {key_of(override) for override in new if not override.startswith("+")}  # needs the + that added it
    saved = [
        override
        for override in saved
        if not (key_of(override) in named or key_of(override).startswith(groups))
        or (override.startswith("+") and key_of(override) in set_again)
    ]
    if not own and not set(saved) <= set(typed):
        _refuse_code(saved, asked)
    return saved


def _refuse_code(saved: list[str], asked: str) -> None:
    """The overrides of another user's run are data: they may choose among the classes that ``conf`` names, and may not
    add any."""
    known = {target for file in CONF.rglob("*.yaml") for target in _targets(OmegaConf.load(file))}
    for override in saved:
        if override.startswith("-") or key_of(override).startswith("hydra") or "$" in override:
            raise ValueError(f"{asked} would use the override {override}; type it again if you trust it")
    try:
        foreign = set(_targets(compose("train", saved))) - known
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(
            f"{asked} has overrides that no longer compose ({str(error).splitlines()[0]}); "
            f"use ckpt_path=<a copy of its last.ckpt in another folder>, which brings no overrides"
        ) from None
    if foreign:
        code = ", ".join(sorted(foreign))
        raise ValueError(f"{asked} would execute {code}; type the override that names it again if you trust it")


def _targets(cfg: DictConfig | ListConfig) -> list[str]:
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
