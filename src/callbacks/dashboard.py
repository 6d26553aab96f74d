"""What TensorBoard shows of a run."""

import time
import weakref
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

# The name in metrics.csv: the name here. TensorBoard sorts groups and charts by name, and HParams shows the first five.
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
NO_CHARTS = ("step", "epoch", "tokens_seen")  # straight lines
VS_TOKENS = {tag: f"vs_tokens/{tag.replace('/', '_')}" for tag in ("loss/train", "loss/val", "training/loss")}
LAYOUT = {
    "training and validation": {
        "loss over steps": ["Multiline", ["^loss/"]],
        "loss over tokens": ["Multiline", ["^vs_tokens/loss_"]],
        "perplexity over steps": ["Multiline", ["^perplexity/(train|val)$"]],
    }
}


class Dashboard(TensorBoardLogger):
    """Writes a run's event file into ``save_dir`` itself: TensorBoard calls a run by the folder that its events lie in.

    Scalars are grouped as ``TAGS`` says, others keep their names. Losses are written a second time with the tokens seen
    in the place of the step. Custom Scalars shows both splits in one chart.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    @property
    def log_dir(self) -> str:
        return self.save_dir  # Lightning's own would expand a "$" or "~" in the folder's name

    @property
    def experiment(self) -> SummaryWriter:
        new = self._experiment is None
        writer = super().experiment
        if new and self._experiment is not None:
            weakref.finalize(self, writer.close)
        return writer

    def resume(self, step: int) -> None:
        """Go on behind ``step``: what an interrupted run wrote beyond it is dropped, to be written again.

        TensorBoard's own ``purge_step`` would compare ``step`` with the tokens of the curves over tokens as well.
        """
        before = sorted(Path(self.log_dir).glob("events.out.tfevents.*"))
        part = Path(self.log_dir, "events.part")
        with part.open("wb") as file:
            writer = RecordWriter(file)
            # All over again, for a dashboard that has read the old files.
            start = Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)).SerializeToString()
            writer.write(start)
            for record in (record for path in before for record in RawEventFileLoader(str(path)).Load()):
                event = Event.FromString(record)
                if event.HasField("session_log"):  # of a file that holds all that the ones before it held
                    file.seek(0)
                    file.truncate()
                    writer.write(start)
                tags = [value.tag for value in event.summary.value if not _is_hyperparameter(value)]
                if event.step > step and not set(tags) <= set(VS_TOKENS.values()):
                    break
                if tags:
                    writer.write(record)
        # TensorBoard reads the files in the order of their names, seconds first: this one before the one to come.
        part.replace(part.with_name(f"events.out.tfevents.{time.time() - 1:.6f}"))
        for path in before:
            path.unlink()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        shown = {TAGS.get(key, key): value for key, value in metrics.items() if key not in NO_CHARTS}
        super().log_metrics(shown, step)
        if "tokens_seen" in metrics:
            losses = {VS_TOKENS[tag]: value for tag, value in shown.items() if tag in VS_TOKENS}
            super().log_metrics(losses, int(metrics["tokens_seen"]))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write ``params`` for HParams, and the layout of Custom Scalars. Without a list of its columns, HParams takes
        those of all runs, the ones that differ first; with one, those of the first run."""
        values = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in params.items()}
        _, start, end = hparams(values, {})
        for summary in start, end:
            self.experiment.file_writer.add_summary(summary)
        self.experiment.add_custom_scalars(LAYOUT)

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()  # and no hparams.yaml: .hydra/config.yaml has them

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """One file for validation, training, validation: it is closed with the logger."""
        if self._experiment is not None:
            self.save()


def _is_hyperparameter(value: Any) -> bool:
    return value.metadata.plugin_data.plugin_name in ("hparams", "custom_scalars")
