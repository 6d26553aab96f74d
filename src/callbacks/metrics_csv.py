"""``metrics.csv``: a row per logged step."""

import csv
import io
import logging
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from src.files import read_rows, write_text

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """Writes ``metrics.csv`` into ``save_dir``, one row per step, each as soon as it is logged.

    Lightning's CSVLogger writes the losses, the validation and the speed of a step as three rows, and keeps up to 100
    rows in memory.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir, "metrics.csv")
        self._columns: list[str] = ["step", "epoch", "tokens_seen", "lr", "train/loss", "train/eval_loss", "val/loss"]
        self._row: dict[str, Any] = {}
        self._row_start = 0

    def resume(self, step: int) -> None:
        """Drop what an interrupted run logged after ``step``, because it will be logged again."""
        if not self.path.exists():
            return
        rows, damaged = read_rows(self.path)
        if damaged:
            aside = self.path.with_name(f"metrics_damaged_{time.strftime('%Y-%m-%d_%H-%M-%S')}.csv")
            self.path.replace(aside)
            log.warning("%s is damaged and kept as %s; %d of its rows are kept", self.path, aside.name, len(rows))
        self._columns = list(rows[0]) if rows else self._columns
        kept = [row for row in rows if int(row["step"]) <= step]
        self._rewrite(kept[:-1])
        for row in kept[-1:]:
            known = {key: value for key, value in row.items() if value}
            self.log_metrics(known | {"step": int(row["step"])}, int(row["step"]))

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: run.json holds the resolved config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._row.get("step") == step:
            self._row.update(metrics)
        else:
            self._row = {"step": step, **metrics}
            self._row_start = self.path.stat().st_size if self.path.exists() else 0
        if new := [key for key in self._row if key not in self._columns]:
            self._add_columns(new)
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, self._line(dict(zip(self._columns, self._columns, strict=True))))
            self._row_start = self.path.stat().st_size
        with self.path.open("r+", newline="") as file:
            file.seek(self._row_start)
            file.write(self._line(self._row))
            file.truncate()

    def _add_columns(self, new: list[str]) -> None:
        self._columns += new
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"] != str(self._row["step"])]
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        header = dict(zip(self._columns, self._columns, strict=True))
        write_text(self.path, "".join(map(self._line, [header, *rows])))
        self._row_start = self.path.stat().st_size

    def _line(self, row: dict[str, Any]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, lineterminator="\n").writerow(row)
        return buffer.getvalue()
