"""How Lightning writes and reads the checkpoints of a run."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from src.checkpoint.find import read_checkpoint
from src.checkpoint.parts import OPTIMIZER, WEIGHTS
from src.checkpoint.storage import write_sealed
from src.files import link


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes and reads checkpoints with :mod:`src.checkpoint.storage`. A new ``last.ckpt`` leaves the old one as
    ``previous.ckpt``; ``storage_options`` is a list of further names for it. ``seconds`` is the time spent writing.

    Lightning writes through a temporary folder that may lie on another file system, where a rename is not atomic, and
    never flushes the file to the disk. PyTorch does not notice a flipped bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        started, path = time.perf_counter(), Path(path)
        write_sealed(checkpoint, path, previous=path.with_name("previous.ckpt") if path.stem == "last" else None)
        for name in storage_options or ():
            link(path, name)
        self.seconds += time.perf_counter() - started

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), kinds=(WEIGHTS, OPTIMIZER))
