"""Runs side by side: the rows of a table of what differs and what came out, and a figure of their losses."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.checkpoint.pickles import is_checkpoint
from src.files import read_rows
from src.runs.record import read_record
from src.runs.report import flat
from src.runs.tables import cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS, BITS = "val/loss", "val/bits_per_byte"
IF_DIFFERENT = ("val_tokens", "parameters", "device", "git")  # no result: a column only if the runs differ
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # Okabe & Ito 2008
LINES = (("o", "-"), ("s", "--"), ("^", ":"))  # of the first six runs, the next six, and so on


@dataclass(frozen=True)
class ComparedRun:
    """A run folder as it is now; ``metrics`` are the rows of ``metrics.csv`` without empty cells."""

    name: str
    folder: Path
    settings: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, float]]
    tokenizer: str  # gpt2, or a hash

    def curve(self, x: str, y: str) -> list[tuple[float, float]]:
        return [(row[x], row[y]) for row in self.metrics if x in row and y in row]

    def results(self) -> dict[str, Any]:
        """The columns that follow the settings. A run that has not ended has the numbers of its last row."""
        record = self.record
        last = {key: int(value) for key, value in (self.metrics or [{}])[-1].items() if key in ("step", "tokens_seen")}
        losses, bits = ([loss for _, loss in self.curve("step", key)] for key in (LOSS, BITS))
        loss = record.get("val_loss", losses[-1] if losses else None)
        best = [*losses, *(record[key] for key in ("best_val_loss", "val_loss") if key in record)]
        checkpoints = [self.folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        return {
            "status": self.status(),
            "best_val_loss": min(best, default=None),
            "val_loss": loss,
            "val_perplexity": None if loss is None else math.exp(min(loss, 700)),
            "best_bits_per_byte": min(bits, default=None),
            "bits_per_byte": bits[-1] if bits else None,
            "steps": record.get("optimizer_steps", last.get("step")),
            "tokens": record.get("tokens_seen", last.get("tokens_seen")),
            **{key: record.get(key) for key in ("seconds", "tokens_per_second", *IF_DIFFERENT)},
            "checkpoint": next((str(path) for path in checkpoints if is_checkpoint(path)), None),
        }

    def status(self) -> str:
        """What the record says, or ``killed`` for a run that could not record its end."""
        from filelock import FileLock, Timeout

        status, lock = self.record.get("status", "failed"), self.folder / ".lock"
        with suppress(Timeout, OSError):
            if status == "running" and lock.is_file():
                with FileLock(lock, timeout=0):
                    return "killed"
        return status


def read_run(folder: Path, name: str, settings: dict[str, Any] | None = None) -> ComparedRun:
    """The run in ``folder``, without damaged values. ``settings`` are its whole config by default."""
    record = read_record(folder)
    if settings is None:
        left_out = ("resume", "reproduce", "dry_run", "name")
        settings = {key: value for key, value in flat(record.get("config", {})) if key not in left_out}
    table = folder / "tokenizer.json"
    tokenizer = hashlib.sha256(table.read_bytes()).hexdigest() if table.is_file() else "gpt2"
    rows = [{key: _number(value) for key, value in row.items()} for row in read_rows(folder / "metrics.csv")[0]]
    metrics = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return ComparedRun(name, folder, settings, record, metrics, tokenizer)


def _number(value: Any) -> float | None:
    with suppress(TypeError, ValueError, OverflowError):
        return float(value) if math.isfinite(float(value)) else None
    return None


def compared_column(runs: list[ComparedRun]) -> str:
    """The column of ``metrics.csv`` that compares ``runs``: losses per token of different tokens do not."""
    return BITS if len({run.tokenizer for run in runs}) > 1 else LOSS


def differences(runs: list[ComparedRun]) -> dict[str, list[list[ComparedRun]]]:
    """The settings that are not the same in all runs, with the runs of each value. Runs without any do not count."""
    known = [run for run in runs if run.settings]
    found: dict[str, dict[str, list[ComparedRun]]] = {key: {} for run in known for key in run.settings}
    for key, groups in found.items():
        for run in known:
            groups.setdefault(repr(run.settings.get(key)), []).append(run)
    return {key: list(groups.values()) for key, groups in found.items() if len(groups) > 1}


def rows_of(runs: list[ComparedRun]) -> list[dict[str, Any]]:
    """The table: a row per run, with the columns that differ or are results."""
    keys, found = differences(runs), [run.results() for run in runs]
    left_out = {key for key in found[0] if all(row[key] is None for row in found)}
    left_out |= {key for key in IF_DIFFERENT if len({repr(row[key]) for row in found} - {"None"}) == 1}
    rows = [
        {"run": run.name, **{key: run.settings.get(key) for key in keys}, **row}
        for run, row in zip(runs, found, strict=True)
    ]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def figure_of(runs: list[ComparedRun]) -> Figure:
    """The validation loss, or bits per byte, over tokens and over seconds of training, and the training loss, thin. A
    run from before ``perf/seconds`` was logged is in the first panel only."""
    from src.evaluation.figures import label_log_axis, new_figure, short

    keys, y, found = differences(runs), compared_column(runs), []
    figure, panels = new_figure(9.6, 3.6 + 0.1 * len(runs), ncols=2, sharey=True)
    axis = {"tokens_seen": "tokens seen", "perf/seconds": "seconds of training"}
    for axes, (x, label) in zip(panels, axis.items(), strict=True):
        for at, run in enumerate(runs):
            color, (marker, line) = COLORS[at % len(COLORS)], LINES[at // len(COLORS) % len(LINES)]
            name = ", ".join([run.name, *(f"{key.split('.')[-1]}={cell(key, run.settings.get(key))}" for key in keys)])
            points, training = run.curve(x, y), run.curve(x, "train/loss") if y == LOSS else []
            if training:
                axes.plot(*zip(*training, strict=True), color=color, linewidth=0.4, alpha=0.4)
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 3, "linewidth": 1.2}
            axes.plot(
                *(zip(*points, strict=True) if points else ([], [])),
                label=name if len(name) <= 70 else f"{name[:67]}...",
                **style,
            )
            found += [value for _, value in points]
        axes.set(xlabel=label, yscale="log")
        axes.xaxis.set_major_formatter(short)
        if not any(run.curve(x, y) for run in runs):
            axes.text(0.5, 0.5, f"no run has {x} and {y}", ha="center", transform=axes.transAxes)
    if found:
        label_log_axis(panels[0].yaxis, min(found), max(found))
    panels[0].set_ylabel("validation loss (nats per token)" if y == LOSS else "bits per byte of the validation split")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    return figure


def jobs_of(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs, in the order of their numbers."""
    jobs = {path.parent for name in (".hydra", "run.json") for path in folder.glob(f"*/{name}")}
    return sorted(jobs, key=lambda job: (int(job.name) if job.name.isdecimal() else math.inf, job.name))
