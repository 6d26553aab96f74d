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
    """Prints every job of a sweep, the lowest validation loss first, and fails the sweep if any job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = [(job, _outcome(job)) for job in sorted(folder.iterdir()) if (job / ".hydra").is_dir()]
        rows.sort(key=lambda row: row[1][0])
        print(f"\n{'val loss':>10}  {'status':<10}  {'job':<4}  overrides")
        for job, (loss, status, overrides) in rows:
            print(f"{loss if math.isfinite(loss) else '-':>10.6}  {status:<10}  {job.name:<4}  {overrides}")
        print(f"sweep folder: {folder}")
        failed = [job.name for job, (_, status, _) in rows if status not in ("completed", "checked")]
        if failed:
            raise SystemExit(1)


def _outcome(job: Path) -> tuple[float, str, str]:
    overrides = " ".join(
        line[2:] for line in (job / ".hydra" / "overrides.yaml").read_text().splitlines() if line.startswith("- ")
    )
    try:
        record = json.loads((job / "run.json").read_text())
    except (OSError, ValueError):
        return math.inf, "failed", overrides
    loss = record.get("val_loss")
    return (math.inf if loss is None else loss), record["status"], overrides
