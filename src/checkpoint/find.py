"""The checkpoints of a run, in from files, and falling back to an older one."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from src.checkpoint.sealed import DamagedError, printable, read_sealed
from src.files import link

log = logging.getLogger(__name__)


def read_checkpoint(path: Path, key: str = "ckpt_path", unsealed: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of a run. See :func:`~src.checkpoint.sealed.read_sealed`.

    Raises:
        ValueError: a file of another kind.
    """
    content = read_sealed(path, key, unsealed)
    if not (isinstance(content, dict) and content.get("optimizer_states") and "hyper_parameters" in content):
        raise ValueError(f"{key}={path} has no optimizer to go on with: weights={path} to start from its weights")
    return content


def good_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at ``path`` and its content; if it is damaged, the newest good one beside it.

    Raises:
        ValueError: as :func:`read_checkpoint`.
    """
    try:
        return path, read_checkpoint(path)
    except DamagedError as error:
        found = newest_good_checkpoint(path.parent)
        if found is None:
            raise
        log.warning("%s, taking %s", str(error).split(": ckpt_path=")[0], printable(found[0]))
        return found


def newest_good_checkpoint(folder: Path, unsealed: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint in ``folder`` of the latest step that is sound, with its content; damaged ones are reported.
    See :func:`~src.checkpoint.sealed.read_sealed` for ``unsealed``."""
    files = [path for path in folder.glob("*.ckpt") if path.is_file()]  # a pipe would be waited for
    for path in sorted(files, key=lambda path: (_step_that_it_claims(path), path.name == "last.ckpt"), reverse=True):
        try:
            return path, read_checkpoint(path, unsealed=unsealed)
        except ValueError as error:
            log.warning("%s: looking for an older one", str(error).split(": ckpt_path=")[0])
    return None


def make_last(path: Path) -> None:
    """Let ``last.ckpt`` be what ``path`` beside it is: where the run stands, also if there is nothing left to train."""
    if path.name != "last.ckpt":
        link(path, path.with_name("last.ckpt"))


def _step_that_it_claims(path: Path) -> float:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # damaged: to be looked at, and reported, first
        return math.inf
