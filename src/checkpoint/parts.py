"""Checkpoints in parts: folders into which each rank of a sharded model has written its own tensors."""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.checkpoint.pickles import MANIFEST, is_in_parts, printable
from src.checkpoint.seal import DamagedError
from src.checkpoint.storage import read_sealed
from src.files import read_json, sha256_of

REST = "rest.ckpt"  # everything but the tensors, sealed
WEIGHTS, OPTIMIZER = "state_dict", "optimizer_states"


def read_file_or_parts(
    path: Path, key: str, unsealed: bool = False, kinds: Collection[str] = (), verify: bool = True
) -> Any:
    """What :func:`~src.checkpoint.storage.read_sealed` reads, or a checkpoint in parts: of its tensors, only the
    ``kinds`` :data:`WEIGHTS` and :data:`OPTIMIZER` that are asked for are read, into memory. ``verify=False`` leaves
    the comparison of its files with their SHA-256 to another rank.

    Raises:
        DamagedError, ValueError: as :func:`~src.checkpoint.storage.read_sealed`.
    """
    if not is_in_parts(path):
        return read_sealed(path, key, unsealed)
    content = read_sealed(path / REST, key)
    damage = f"the content of {file} does not match its SHA-256" if verify and (file := _damaged_file(path)) else None
    try:
        if not damage:
            _read_tensors(path, content, kinds)
    except Exception as error:  # whatever safetensors or PyTorch raise on files of a stranger
        damage = f"it cannot be read ({type(error).__name__})"
    if damage:
        cure = f"use {key}=<run folder>/checkpoints/last.ckpt"
        raise DamagedError(f"{key}={printable(path)} is damaged, {damage}; {cure}")
    return content


def _damaged_file(folder: Path) -> str | None:
    """A file in ``folder`` that is not the one that was written, missing or not in the manifest."""
    expected = read_json(folder / MANIFEST)
    found = {file.name: file for file in folder.glob("*.safetensors")}
    return next(
        (name for name in expected if name not in found or sha256_of(found[name]) != expected[name]),
        next(iter(found.keys() - expected.keys()), None),
    )


def load_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors``, sharded or whole, from ``folder``. Every rank calls it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # takes a second without Lightning
    from torch.distributed.checkpoint.state_dict_loader import load

    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def _read_tensors(folder: Path, checkpoint: dict[str, Any], kinds: Collection[str]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype)
        for name, kept in described.items()
        if name.partition(".")[0] in kinds
    }
    with warnings.catch_warnings(action="ignore"):  # that this is a single process
        load(found, storage_reader=reader, no_dist=True)
    for name, tensor in found.items():
        kind, _, key = name.partition(".")
        if kind == WEIGHTS:
            checkpoint[WEIGHTS][key] = tensor
        else:
            optimizer, number, moment = key.split(".")
            checkpoint[OPTIMIZER][int(optimizer)]["state"].setdefault(int(number), {})[moment] = tensor


def tensors_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights and the optimizers' tensors in ``checkpoint``, by names that all ranks share."""
    moments = {
        f"{OPTIMIZER}.{place}.{number}.{moment}": tensor
        for place, optimizer in enumerate(checkpoint[OPTIMIZER])
        for number, state in optimizer["state"].items()
        for moment, tensor in state.items()
    }
    return {f"{WEIGHTS}.{name}": tensor for name, tensor in checkpoint[WEIGHTS].items()} | moments
