"""The table at the end of a multirun."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class SweepTable(Callback):
    """Prints every job of a sweep, the lowest loss first, and fails the sweep if any job failed.

    ``columns`` are the headings and the numbers of each job's ``record`` below them; the first one sorts.
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
        print(f"sweep folder: {folder}")
        if any(status not in ("completed", "checked") for _, _, status, _ in rows):
            raise SystemExit(1)

    def _outcome(self, job: Path) -> tuple[list[float], str, str]:
        overrides = " ".join(
            line[2:] for line in (job / ".hydra" / "overrides.yaml").read_text().splitlines() if line.startswith("- ")
        )
        try:
            record = json.loads((job / self.record).read_text())
        except (OSError, ValueError):
            return [math.inf] * len(self.columns), "failed", overrides
        numbers = [record.get(key) for key in self.columns.values()]
        return [math.inf if number is None else number for number in numbers], record["status"], overrides
