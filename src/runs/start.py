"""Whether what is asked for can be the continuation of what a checkpoint holds."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.runs import processes
from src.model.config import GPTConfig
from src.training.config import ScheduleConfig

FREE = ("drop_rate", "init")  # of the model: what a continued run may change


def different_model(cfg: DictConfig, model: dict[str, Any], path: Path) -> list[str]:
    """How the model asked for differs from the one of the checkpoint at ``path``, a line each."""
    return [
        f"model.{key}={OmegaConf.select(cfg.model, key)} differs from {value} in {path}: model.{key}={value}"
        for key, value in model.items()
        if key not in FREE and OmegaConf.select(cfg.model, key) != value
    ]


def adopt_model(cfg: DictConfig, model: dict[str, Any], source: Path | str) -> list[str]:
    """Put the model of ``source`` into ``cfg``, which keeps its own dropout; or what else was asked for, a line each.

    Asked for is what differs from the defaults.
    """
    default, asked = asdict(GPTConfig()), OmegaConf.to_container(cfg.model)
    found = [
        f"model.{key}={asked[key]} differs from {value} in {source}, which brings its own model: leave model, "
        f"model.{key} and experiments that set it away"
        for key, value in model.items()
        if key not in FREE and asked[key] not in (value, default[key])
    ]
    if not found:
        cfg.model.update({key: value for key, value in model.items() if key not in FREE})
    return found


def different_optimizer(cfg: DictConfig, optimizer: dict[str, Any], path: Path) -> list[str]:
    """Whether the optimizer asked for is another kind than that of the checkpoint at ``path``."""
    before = optimizer.get("name", "adamw")
    if cfg.optimizer.name == before:
        return []
    return [
        f"optimizer={cfg.optimizer.name} differs from {before} in {path}, whose state is of no use to it: "
        f"optimizer={before}, or weights={path} for a new run"
    ]


def different_values(cfg: DictConfig, checkpoint: dict[str, Any], path: Path) -> list[str]:
    """How the data or the geometry of the batches differs from that of the checkpoint at ``path``, a line each."""
    found, before = [], checkpoint.get("fixed_values", {})
    batch = ("data.batch_size", "trainer.accumulate_grad_batches")
    asked = [OmegaConf.select(cfg, key) for key in batch]
    devices, devices_before = processes.world_size(), checkpoint.get("processes", 1)
    step = math.prod(asked) * devices  # windows
    step_before = math.prod(before.get(key, value) for key, value in zip(batch, asked, strict=True)) * devices_before
    if step != step_before and devices != devices_before:
        accumulate, rest = divmod(step_before, devices * asked[0])
        cure = f"trainer.devices={devices_before}" if rest else f"trainer.accumulate_grad_batches={accumulate}"
        return [
            f"a step of {step} windows on {devices} devices differs from the {step_before} on {devices_before} in "
            f"{path}: {cure}, or weights={path} for a new run"
        ]
    defaults = {"data.stride": cfg.data.context_length, "trainer.limit_train_batches": 1.0}
    for key, value in before.items():
        if key in ("tokenizer", "data_sha256") or (step == step_before and key in batch):  # the text is read later
            continue
        now = OmegaConf.select(cfg, key)
        now = defaults.get(key) if now is None else now
        if now != value:
            found.append(f"{key}={now} differs from {value} in {path}: {key}={value}, or weights={path} for a new run")
    return found


def check_text(checkpoint: dict[str, Any], path: Path, now: dict[str, Any]) -> None:
    """Whether the text and the tokenizer are those of the checkpoint at ``path``; otherwise a ValueError."""
    before = checkpoint.get("fixed_values", {})
    for key, what in ("data_sha256", "text"), ("tokenizer", "tokenizer"):
        if before.get(key, now[key]) != now[key]:
            raise ValueError(
                f"data.path: the {what} is not the one that {path} was trained on ({key} {now[key][:12]}, was "
                f"{before[key][:12]}): data.path=<that text>, or weights={path} for a new run on this one"
            )


def check_epoch(checkpoint: dict[str, Any], path: Path, windows: int) -> None:
    """Whether an epoch has as many ``windows`` as in the run of the checkpoint, whose batches may have been of another
    size, for another number of devices; otherwise a ValueError."""
    before = checkpoint.get("epoch_windows", windows)
    if before != windows:
        batch = checkpoint["batch_windows"]
        raise ValueError(
            f"an epoch would have {windows:,} windows, that of {path} has {before:,}, in batches of {batch}: "
            f"trainer.devices x data.batch_size = {batch}, or weights={path} for a new run"
        )


def steps_of_schedule(cfg: DictConfig, checkpoint: dict[str, Any], steps: float) -> float:
    """The optimizer steps that the learning rate's curve is laid out over, in a run that makes ``steps`` in all.

    Raises:
        ValueError: a continued run has another length, and ``schedule.on_resume`` does not say what that means.
    """
    before = checkpoint.get("schedule_steps", steps)
    if cfg.schedule.name == "constant" or before == steps or cfg.schedule.on_resume == "stretch":
        return steps
    if cfg.schedule.on_resume == "keep":
        return before
    from src.training.optim import learning_rate_at

    config, peak, at = ScheduleConfig(**cfg.schedule), cfg.optimizer.learning_rate, checkpoint["global_step"]
    kept, last, stretched = (
        f"{learning_rate_at(step, total, peak, config):.2e}"
        for step, total in ((at, before), (before, before), (at, steps))
    )
    raise ValueError(
        f"the learning rate was laid out over {before:,} steps, the run is to make {steps:,}: schedule.on_resume=keep "
        f"(it goes on at {kept} and stays at {last} from step {before:,}) or schedule.on_resume=stretch (it goes on at "
        f"{stretched}, on a curve of {steps:,} steps)"
    )
