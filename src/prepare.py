"""Tokens on disk from text larger than memory: ``python -m src.prepare source=<files> output=<folder>``. The keys are
explained in ``conf/prepare.yaml``."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from src.cli import app
from src.cli.typed import typed
from src.data.config import PrepareConfig

log = logging.getLogger(__name__)


def check(cfg: DictConfig) -> PrepareConfig:
    """``cfg`` as a frozen config.

    Raises:
        ValueError: every problem that can be found without reading the sources, one per line.
    """
    config = typed(cfg, PrepareConfig)
    from src.data.documents import find_sources

    found = []
    try:
        find_sources(config.paths)
    except ValueError as error:
        found.append(str(error))
    try:
        app.check_output(Path(config.output).expanduser())
    except ValueError as error:
        found.append(str(error))
    if found:
        raise ValueError("\n".join(found))
    return config


def prepare(cfg: DictConfig) -> None:
    """Make the shards that ``cfg`` asks for.

    Raises:
        ValueError: the problems of the config, and those of :func:`~src.data.prepare.prepare_shards`.
    """
    config = check(cfg)
    from src.data.documents import find_sources
    from src.data.prepare import prepare_shards
    from src.data.progress import progress

    size = sum(file.stat().st_size for file in find_sources(config.paths))
    with progress("tokenising", size, "bytes") as advance:
        manifest = prepare_shards(config, advance=advance)
    for shard in manifest["shards"]:
        log.info("%s  %s tokens", shard["file"], f"{shard['tokens']:,}")
    counts = ", ".join(f"{manifest[key]:,} {key}" for key in ("tokens", "documents", "characters"))
    skipped = f", {manifest['skipped']:,} skipped ({config.text_key} is null)" if manifest["skipped"] else ""
    print(f"{config.output}: {len(manifest['shards']):,} shards, {counts}{skipped}")


if __name__ == "__main__":
    app.launch("prepare", prepare, check)
