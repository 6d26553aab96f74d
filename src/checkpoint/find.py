"""Reading a checkpoint of a run, or an older one if it is damaged."""

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from src.checkpoint.parts import REST, read_file_or_parts
from src.checkpoint.pickles import is_checkpoint, is_in_parts, printable
from src.checkpoint.seal import DamagedError

log = logging.getLogger(__name__)


def read_checkpoint(
    path: Path,
    key: str = "ckpt_path",
    unsealed: bool = False,
    kinds: Collection[str] = (),
    verify: bool = True,
) -> dict[str, Any]:
    """The content of a checkpoint; see :func:`~src.checkpoint.parts.read_file_or_parts`. One in parts is read without
    tensors unless ``kinds`` names them.

    Raises:
        ValueError: as :func:`~src.checkpoint.storage.read_sealed`, or the file is not a checkpoint with an optimizer.
    """
    content = read_file_or_parts(path, key, unsealed, kinds, verify)
    if not (isinstance(content, dict) and content.get("optimizer_states") and "hyper_parameters" in content):
        raise ValueError(
            f"{key}={path} has no optimizer state to resume from; use weights={path} to start from its weights"
        )
    return content


def good_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """``path`` and its content or, if it is damaged, those of the newest undamaged checkpoint in the same folder.

    Raises:
        ValueError: as :func:`read_checkpoint`.
    """
    try:
        return path, read_checkpoint(path)
    except DamagedError as error:
        found = newest_good_checkpoint(path.parent)
        if found is None:
            raise
        log.warning("%s, reading %s instead", _problem(error), printable(found[0]))
        return found


def newest_good_checkpoint(
    folder: Path, unsealed: bool = False, kinds: Collection[str] = ()
) -> tuple[Path, dict[str, Any]] | None:
    """The undamaged checkpoint of the latest step in ``folder``, with its content. Damaged ones are logged. See
    :func:`read_checkpoint` for ``unsealed`` and ``kinds``."""
    files = filter(is_checkpoint, folder.glob("*.ckpt"))
    for path in sorted(files, key=lambda path: (_claimed_step(path), path.name == "last.ckpt"), reverse=True):
        try:
            return path, read_checkpoint(path, unsealed=unsealed, kinds=kinds)
        except ValueError as error:
            log.warning("%s, looking for an older one", _problem(error))
    return None


def _claimed_step(path: Path) -> float:
    path = path / REST if is_in_parts(path) else path
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # it is damaged: read it first, so that it is reported
        return math.inf


def _problem(error: ValueError) -> str:
    return str(error).split("; use ")[0]
