"""Tokens on disk from text larger than memory: ``python -m src.prepare source=<files> output=<folder>``. The keys are
explained in ``conf/prepare.yaml``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.cli import app
from src.cli.overrides import CONF
from src.cli.typed import typed
from src.config import problems_of, refuse
from src.data.config import PrepareConfig
from src.data.manifest import Part, unfinished_parts

log = logging.getLogger(__name__)


def check(cfg: DictConfig) -> PrepareConfig:
    """``cfg`` as a frozen config.

    Raises:
        ValueError: every problem that can be found without reading the sources, one per line.
    """
    config = _config(cfg)
    from src.data.documents import find_sources

    found = problems_of(lambda: Part.parse(config.part).of(find_sources(config.paths)))
    if not config.dry_run:
        found += problems_of(app.check_output, config.folder)
    refuse(found)
    return config


def _config(cfg: DictConfig) -> PrepareConfig:
    """``cfg`` as a frozen config. ``source=<name>`` takes the section ``prepare`` of ``conf/data/<name>.yaml``, except
    for keys whose values in ``cfg`` are not the defaults."""
    config = typed(cfg, PrepareConfig)
    name = config.source if isinstance(config.source, str) else ""
    file = CONF / "data" / f"{name}.yaml"
    if Path(name).name != name or not file.is_file():
        return config
    corpus: Any = OmegaConf.to_container(OmegaConf.load(file))
    default = {key: field.default for key, field in PrepareConfig.model_fields.items()} | {"source": name}
    values = corpus.get("prepare", {}).items()
    return config.changed(**{key: value for key, value in values if getattr(config, key) == default[key]})


def prepare(cfg: DictConfig) -> None:
    """Make the shards that ``cfg`` asks for, or print what is in their text.

    Raises:
        ValueError: the problems of the config, and those of :func:`~src.data.prepare.prepare_shards`.
    """
    config = check(cfg)
    from src.data.documents import find_sources, size_of
    from src.data.prepare import prepare_shards, read_facts
    from src.data.progress import progress

    part = Part.parse(config.part)
    sizes = [size_of(file) for file in part.of(find_sources(config.paths))]
    total = None if config.max_tokens or None in sizes else sum(size or 0 for size in sizes)
    if config.dry_run:
        with progress("reading", total, "bytes") as advance:
            facts = read_facts(config, advance)
        for key, value in facts.described().items():
            print(f"{key:10}  {value}")
        return
    with progress("tokenizing", total, "bytes") as advance:
        manifest = prepare_shards(config, advance=advance)
    for shard in manifest["shards"]:
        log.info("%s  %s tokens", shard["file"], f"{shard['tokens']:,}")
    counts = ", ".join(f"{manifest[key]:,} {key}" for key in ("tokens", "documents", "characters"))
    skipped = f", {manifest['skipped']:,} skipped ({config.text_key} is null)" if manifest["skipped"] else ""
    which, left = "", ""
    if part.count > 1:
        missing = len(unfinished_parts(config.folder))
        which, left = f", part {part}", f", {part.count - missing} of {part.count} parts complete"
    print(f"{config.output}{which}: {len(manifest['shards']):,} shards, {counts}{skipped}{left}")


if __name__ == "__main__":
    app.launch("prepare", prepare, check)
