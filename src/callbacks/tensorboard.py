"""A run in TensorBoard."""

import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # generated
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from src.files import replacing

# Name in metrics.csv: name in TensorBoard, which sorts groups and charts by name and shows the first five in HParams.
TAGS = {
    "train/eval_loss": "loss/train",
    "val/loss": "loss/val",
    "train/perplexity": "perplexity/train",
    "val/perplexity": "perplexity/val",
    "val/bits_per_byte": "perplexity/val_bits_per_byte",
    "perf/tokens_per_second": "speed/tokens_per_second",
    "perf/mfu": "speed/mfu",
    "lr": "training/learning_rate",
    "train/loss": "training/loss",
    "grad_norm": "training/grad_norm",
}
NO_CHARTS = ("step", "epoch", "tokens_seen", "perf/seconds")  # they are straight lines
VS_TOKENS = {tag: f"vs_tokens/{tag.replace('/', '_')}" for tag in ("loss/train", "loss/val", "training/loss")}
LAYOUT = {
    "training and validation": {
        "loss over steps": ["Multiline", ["^loss/"]],
        "loss over tokens": ["Multiline", ["^vs_tokens/loss_"]],
        "perplexity over steps": ["Multiline", ["^perplexity/(train|val)$"]],
    }
}


class TensorBoard(Logger):
    """Writes a run's event file directly into ``save_dir``, because TensorBoard names a run after the folder of its
    event files.

    Scalars get the names in ``TAGS``; others keep theirs. Losses are written twice, over steps and over tokens seen.
    Custom Scalars shows both splits in one chart.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.folder = Path(save_dir)
        self._writer: SummaryWriter | None = None

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer. The first use creates its file, which serves validation and training, until the logger goes."""
        if self._writer is None:
            self._writer = SummaryWriter(self.folder)
            weakref.finalize(self, self._writer.close)
        return self._writer

    def resume(self, step: int) -> None:
        """Drop what an interrupted run wrote after ``step``, because it will be written again.

        TensorBoard's own ``purge_step`` would also compare ``step`` with the tokens of the curves over tokens.
        """
        before = sorted(self.folder.glob("events.out.tfevents.*"))
        # A server that has read the old files starts over at this event.
        start = Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)).SerializeToString()
        kept = self.folder / "events"  # not yet a name that TensorBoard reads
        with replacing(kept) as part, part.open("wb") as file:
            writer = RecordWriter(file)
            writer.write(start)
            for record in (record for path in before for record in RawEventFileLoader(str(path)).Load()):
                event = Event.FromString(record)
                if event.HasField("session_log"):  # this file repeats everything in the files before it
                    file.seek(0)
                    file.truncate()
                    writer.write(start)
                tags = [value.tag for value in event.summary.value if not _is_hyperparameter(value)]
                if event.step > step and not set(tags) <= set(VS_TOKENS.values()):
                    break
                if tags:
                    writer.write(record)
        # TensorBoard reads files in the order of their names, which begin with seconds: the kept events come first.
        kept.replace(self.folder / f"events.out.tfevents.{time.time() - 1:.6f}")
        for path in before:
            path.unlink()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        shown = {TAGS.get(key, key): value for key, value in metrics.items() if key not in NO_CHARTS}
        for tag, value in shown.items():
            self.experiment.add_scalar(tag, value, step)
            if tag in VS_TOKENS and "tokens_seen" in metrics:
                self.experiment.add_scalar(VS_TOKENS[tag], value, int(metrics["tokens_seen"]))

    @rank_zero_only
    def log_image(self, key: str, images: list[np.ndarray], step: int | None = None) -> None:
        """Show ``images``, each ``(height, width, 3)``, the last one on top."""
        for image in images:
            self.experiment.add_image(key, image, step, dataformats="HWC")

    @rank_zero_only
    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int | None = None) -> None:
        """Show the cells of ``data``, in Markdown, one after the other."""
        self.experiment.add_text(key, "\n\n".join(cell for row in data for cell in row), step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write ``params`` for HParams, and the layout of Custom Scalars.

        No list of metrics is written: HParams would then show only the columns of the first run, instead of those of
        all runs with the ones that differ first.
        """
        values = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in params.items()}
        _, start, end = hparams(values, {})
        for summary in start, end:
            self.experiment.file_writer.add_summary(summary)
        self.experiment.add_custom_scalars(LAYOUT)

    @rank_zero_only
    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush, but do not close: fit and validate each call this."""
        self.save()


def _is_hyperparameter(value: Any) -> bool:
    return value.metadata.plugin_data.plugin_name in ("hparams", "custom_scalars")
