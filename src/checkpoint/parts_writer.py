"""Writes checkpoints in parts, while training goes on."""

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from src.checkpoint.parts import OPTIMIZER, REST, WEIGHTS, tensors_of
from src.checkpoint.pickles import MANIFEST
from src.checkpoint.storage import write_sealed
from src.files import flush, link, remove, sha256_of, write_json, write_text

FILES = 8  # of each rank


class SealedParts(HuggingFaceStorageWriter):
    """Writes the ``names`` of each rank to files of safetensors and, once all are there, their SHA-256; then calls
    ``publish`` on rank 0."""

    def __init__(self, folder: Path, names: Collection[str], publish: Callable[[], None]) -> None:
        # safetensors makes each file in memory first
        files = {name: 1 + at % FILES for at, name in enumerate(sorted(names))}
        super().__init__(str(folder), files, save_distributed=True)
        self.folder = folder
        self.publish = publish

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future:
        written = super().write_data(plan, planner)
        for name in _files(written.wait()):
            write_text(self.folder / f"{name}.sha256", sha256_of(self.folder / name))
        return written

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        sums = {name: self.folder / f"{name}.sha256" for rank in results for name in _files(rank)}
        write_json(self.folder / MANIFEST, {name: file.read_text() for name, file in sorted(sums.items())})
        for file in sums.values():
            file.unlink()
        flush(self.folder / MANIFEST)
        flush(self.folder)
        self.publish()


def _files(results: list[Any]) -> set[str]:
    return {result.storage_data.relative_path for result in results}


def save_parts(checkpoint: dict[str, Any], path: Path, names: Collection[Path], group: ProcessGroup) -> Any:
    """Begin to write ``checkpoint``, whose tensors are sharded over the ranks of ``group``, to the folder ``path``.
    Every rank calls it; the future that it returns is for :func:`wait_for`.

    The tensors are copied before it returns. A thread writes them and puts the folder in place once it is complete,
    with the further ``names``; an old one becomes ``previous.ckpt``.
    """
    part, previous = path.with_name(path.name + ".part"), path.with_name("previous.ckpt")
    if group.rank() == 0:
        remove(part)
        part.mkdir(parents=True, exist_ok=True)
        optimizers = [{**optimizer, "state": {}} for optimizer in checkpoint[OPTIMIZER]]
        write_sealed({**checkpoint, WEIGHTS: {}, OPTIMIZER: optimizers}, part / REST)

    def publish() -> None:
        if path.exists():
            remove(previous)
            path.rename(previous)
        part.rename(path)
        flush(path.parent)
        for name in names:
            link(path, name)

    tensors = tensors_of(checkpoint)
    return async_save(tensors, storage_writer=SealedParts(part, tensors, publish), process_group=group)


def wait_for(saving: Any, path: Path) -> None:
    """Wait for the end of :func:`save_parts`.

    Raises:
        OSError: a rank could not write; what it has written is removed.
    """
    try:
        saving.result()
    except CheckpointException as error:
        with suppress(OSError):  # another rank may be faster
            remove(path.with_name(path.name + ".part"))
        reason = next(iter(error.failures.values()))[0]
        cure = "free some and use resume=<run folder>, or use hydra.run.dir=<a folder on another disk>"
        raise OSError(f"{path} could not be written ({reason}); {cure}") from error
