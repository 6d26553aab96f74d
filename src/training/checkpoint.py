"""Checkpoints and weights in and out of files, whole or not at all, with PyTorch's safe loading only."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from src.model.config import GPTConfig
from src.model.gpt import GPT


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to disk and renames it: the target is always old or new.

    Lightning's own writing passes through two copies in memory, which takes about four times as long, and a temporary
    folder that may lie on another file system, where a rename is no longer atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(checkpoint, Path(path))


def write_atomically(content: dict[str, Any], path: Path) -> None:
    """``torch.save`` that leaves either the old file or the whole new one at ``path``, whenever it is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        torch.save(content, part)  # by path: through a Python file object it takes up to three times as long
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_weights(net: GPT, path: str | Path) -> None:
    """Write the weights of ``net`` and its config, without an optimizer: plain containers and tensors."""
    write_atomically({"config": asdict(net.config), "state_dict": net.state_dict()}, Path(path))


def read_weights(
    path: str | Path, key: str = "weights", with_optimizer: bool = False
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights from a checkpoint of a run, or from a file by :func:`save_weights`.

    ``key`` is the override that named the file, for the messages.

    Raises:
        ValueError: no such file, a file of another kind, or, with ``with_optimizer``, one that has none.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{key}={path} does not exist: {key}=<run folder>/checkpoints/last.ckpt") from None
    except Exception as error:  # whatever torch.load raises on a file it cannot read
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{key}={path} cannot be read ({reason[:120]}): {key}=<run folder>/checkpoints/last.ckpt"
        ) from None
    if with_optimizer and not (isinstance(content, dict) and content.get("optimizer_states")):
        raise ValueError(f"{key}={path} has no optimizer to go on with: weights={path} to start from its weights")
    try:
        if "hyper_parameters" in content:
            weights = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
            return GPTConfig(**content["hyper_parameters"]["model"]), weights
        return GPTConfig(**content["config"]), content["state_dict"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{key}={path} holds no GPT of this project: {key}=<run folder>/checkpoints/last.ckpt"
        ) from None


def load_weights(path: str | Path) -> GPT:
    """The model kept in ``path``, in evaluation mode. See :func:`read_weights`."""
    config, weights = read_weights(path)
    net = GPT(config)
    net.load_state_dict(weights)
    return net.eval()
