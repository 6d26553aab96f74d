"""Measure speed and memory: ``python -m src.benchmark [overrides of src.train]``. See ``conf/benchmark.yaml``."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.bench.config import BenchmarkConfig
from src.cli import app
from src.cli.overrides import unknown_trainer_arguments
from src.cli.typed import built, typed
from src.config import problems_of, refuse
from src.data.config import SIZES, PrepareConfig, TokenizerConfig
from src.files import write_json
from src.runs import launch
from src.runs.record import git_revision, versions


def check(cfg: DictConfig) -> BenchmarkConfig:
    """``cfg`` as a frozen config.

    Raises:
        ValueError: every problem that can be found without reading the text or building the model, one per line.
    """
    config = typed(cfg, BenchmarkConfig)
    trainer = config.trainer.model_dump()
    found = [*unknown_trainer_arguments(trainer), *launch.problems_of_devices(trainer)]
    if launch.may_be_several(trainer):
        found.append("one process is measured; use trainer.devices=1 trainer.num_nodes=1")
    if config.output and Path(config.output).exists():
        found.append(f"output={config.output} already exists; use output=<a new file>")
    elif config.output:
        found += problems_of(app.check_output, Path(config.output).parent)
    if config.source:
        from src.data.documents import find_sources
        from src.data.remote import is_remote

        if is_remote(config.source):
            found.append(f"source={config.source} is not on this machine; use source=<a local copy>")
        else:
            found += problems_of(lambda: find_sources(PrepareConfig(source=config.source or "").paths))
    if config.tokenizer != TokenizerConfig():
        cure = f"tokenizer=gpt2 model.vocab_size={config.tokenizer.size or '<its tokens>'}"
        found.append(f"tokenizer={config.tokenizer.name} is not measured; use {cure}")
    refuse([*found, *problems_of(config.accumulated, 1)])
    config = config.accumulated(world_size=1)
    return config.changed(model=config.model.changed(vocab_size=config.model.vocab_size or SIZES["gpt2"]))


def benchmark(cfg: DictConfig) -> dict[str, Any]:
    """Measure what ``cfg`` asks for, print it, and return it as it is written to ``cfg.output``.

    Raises:
        ValueError: the problems of the config; a process that failed, for instance because memory ran out.
    """
    config = check(cfg)
    import torch

    from src.bench.measures import MEASURES
    from src.device import device_name, pick_accelerator, pick_precision

    device = pick_accelerator(config.trainer.accelerator)
    precision = str(config.trainer.precision or pick_precision(device))
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": device_name(torch.device(device)),
        "system": f"{platform.system()}, {os.cpu_count()} cores",
        "versions": versions(),
        "git": git_revision(),
        "precision": precision,
        "config": config.model_dump(mode="json"),
    }
    print(f"{found['device']}, {found['system']}, PyTorch {found['versions']['torch']}, {found['date']}", flush=True)
    for name in config.measure:
        found[name] = MEASURES[name](config, device, precision, built)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(config.output), found)
    return found


if __name__ == "__main__":
    app.launch("benchmark", benchmark, check)
