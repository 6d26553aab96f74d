"""The checkpoints and weights of a run, out to files and in again."""

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.training.sealed import DamagedError, read_sealed, write_atomically

log = logging.getLogger(__name__)


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its target, seals it with its SHA-256, flushes it to disk and renames it.

    Lightning's own writing passes through a temporary folder that may lie on another file system, where a rename is no
    longer atomic, never flushes, and PyTorch does not notice a flipped bit. ``last.ckpt`` leaves its predecessor as
    ``previous.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        write_atomically(checkpoint, path, previous=path.with_name("previous.ckpt") if path.stem == "last" else None)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path, key: str = "ckpt_path") -> dict[str, Any]:
    """The content of a checkpoint of a run. See :func:`~src.training.sealed.read_sealed`.

    Raises:
        ValueError: a file of another kind.
    """
    content = read_sealed(path, key)
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
        log.warning("%s, taking %s", str(error).split(": ckpt_path=")[0], found[0])
        return found


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint in ``folder`` of the latest step that is sound, with its content; damaged ones are reported."""
    for path in sorted(folder.glob("*.ckpt"), key=_step_that_it_claims, reverse=True):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            log.warning("%s: looking for an older one", str(error).split(": ckpt_path=")[0])
    return None


def _step_that_it_claims(path: Path) -> float:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # damaged: to be looked at, and reported, first
        return math.inf


def read_weights(path: str | Path, key: str = "weights") -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights from a checkpoint of a run, or from a file by :func:`save_weights`.

    Raises:
        ValueError: as :func:`read_checkpoint`.
    """
    content = read_sealed(Path(path), key)
    try:
        if "hyper_parameters" in content:
            weights = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
            return GPTConfig(**content["hyper_parameters"]["model"]), weights
        return GPTConfig(**content["config"]), content["state_dict"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{key}={path} holds no GPT of this project: {key}=<run folder>/checkpoints/last.ckpt"
        ) from None


def save_weights(net: GPT, path: str | Path) -> None:
    """Write the weights of ``net`` and its config, without an optimizer: plain containers and tensors."""
    write_atomically({"config": asdict(net.config), "state_dict": net.state_dict()}, Path(path))


def load_weights(path: str | Path) -> GPT:
    """The model kept in ``path``, in evaluation mode. See :func:`read_weights`."""
    config, weights = read_weights(path)
    net = GPT(config)
    net.load_state_dict(weights)
    return net.eval()
