"""Tokens on disk from text larger than memory: ``python -m src.prepare source=<files> output=<folder>``. See
``conf/prepare.yaml``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from src.cli import app
from src.data.config import PrepareConfig

log = logging.getLogger(__name__)

LINE_EVERY = 10  # seconds between lines of progress, where there is no terminal for a bar


def find_problems(cfg: DictConfig) -> list[str]:
    """Everything wrong with ``cfg`` that can be known without reading the sources."""
    checked, found = app.check_sections(cfg, {"": PrepareConfig})
    if not checked:
        return found
    from src.data.documents import find_sources

    try:
        find_sources(checked[""].paths)
    except ValueError as error:
        found += str(error).splitlines()
    return found + app.problems_of_output(Path(checked[""].output).expanduser())


def prepare(cfg: DictConfig) -> None:
    """Make the shards that ``cfg`` asks for.

    Raises:
        ValueError: the problems of the config, and those of :func:`~src.data.prepare.prepare_shards`.
    """
    if problems := find_problems(cfg):
        raise ValueError("\n".join(problems))
    from src.data.documents import find_sources
    from src.data.prepare import prepare_shards

    config = PrepareConfig(**{key: cfg[key] for key in PrepareConfig.__dataclass_fields__})
    with _progress(sum(file.stat().st_size for file in find_sources(config.paths))) as progress:
        manifest = prepare_shards(config, progress=progress)
    for shard in manifest["shards"]:
        log.info("%s  %s tokens", shard["file"], f"{shard['tokens']:,}")
    counts = ", ".join(f"{manifest[key]:,} {key}" for key in ("tokens", "documents", "characters"))
    skipped = f", {manifest['skipped']:,} skipped ({config.text_key} is null)" if manifest["skipped"] else ""
    print(f"{config.output}: {len(manifest['shards']):,} shards, {counts}{skipped}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, a line now and then elsewhere; takes the number of bytes that were read."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokenising", total=total)
        done, started = 0.0, time.monotonic()
        told = started

        def advance(size: float) -> None:
            nonlocal done, told
            done += size
            bar.advance(task, size)
            now = time.monotonic()
            if bar.disable and now - told >= LINE_EVERY and done:
                told, rate = now, done / (now - started)
                log.info("%.0f of %.0f MB, %.1f MB/s, %.0f s left", done / 1e6, total / 1e6, rate / 1e6,
                         (total - done) / rate)  # fmt: skip

        yield advance


if __name__ == "__main__":
    app.launch("prepare", prepare, find_problems)
