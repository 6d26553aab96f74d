"""The table at the end of a sweep."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from src.files import read_json, remove_folder

log = logging.getLogger(__name__)


class SweepTable(Callback):
    """Prints a row per job of a sweep, the lowest loss first, and fails the sweep if a job failed.

    ``columns`` maps the heading of each column to a key of the job's file ``record``; the first column sorts the rows.
    """

    def __init__(self, record: str = "run.json", columns: dict[str, str] | None = None) -> None:
        self.record = record
        self.columns = dict(columns or {"val loss": "val_loss"})

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = [(job, *self._outcome(job)) for job in sorted(folder.iterdir()) if (job / ".hydra").is_dir()]
        rows.sort(key=lambda row: row[1][0])
        print("\n" + "".join(f"{heading:>10}  " for heading in self.columns) + f"{'status':<10}  {'job':<4}  overrides")
        for job, numbers, status, overrides in rows:
            shown = "".join(f"{number if math.isfinite(number) else '-':>10.6}  " for number in numbers)
            print(f"{shown}{status:<10}  {job.name:<4}  {overrides}")
        for job in (job for job, _, status, _ in rows if status == "checked"):  # a dry run leaves nothing
            shutil.rmtree(job)
        if any(folder.glob("*/")):
            print(f"sweep folder: {folder}")
        else:
            remove_folder(folder, "multirun.yaml")
        if any(status not in ("completed", "checked") for _, _, status, _ in rows):
            raise SystemExit(1)

    def _outcome(self, job: Path) -> tuple[list[float], str, str]:
        overrides = " ".join(
            line[2:] for line in (job / ".hydra" / "overrides.yaml").read_text().splitlines() if line.startswith("- ")
        )
        record = read_json(job / self.record)
        found = [record.get(key) for key in self.columns.values()]
        numbers: list[float] = [number if isinstance(number, int | float) else math.inf for number in found]
        return numbers, str(record.get("status", "failed")), overrides
