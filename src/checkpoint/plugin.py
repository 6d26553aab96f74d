"""How Lightning writes and reads the checkpoints of a run."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from src.checkpoint.find import read_checkpoint
from src.checkpoint.sealed import write_atomically


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its target, seals it with its SHA-256, flushes it to disk and renames it.

    Lightning's own writing passes through a temporary folder that may lie on another file system, where a rename is no
    longer atomic, never flushes, and PyTorch does not notice a flipped bit. ``last.ckpt`` leaves its predecessor as
    ``previous.ckpt``. ``seconds`` is the time that all of that has taken so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        started, path = time.perf_counter(), Path(path)
        write_atomically(checkpoint, path, previous=path.with_name("previous.ckpt") if path.stem == "last" else None)
        self.seconds += time.perf_counter() - started

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))
