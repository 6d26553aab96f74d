"""What a run is going to take: memory, disk, tokens, operations and time, known before its model is allocated."""

from __future__ import annotations

import math
import shutil
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from src.callbacks.weight_averaging import ExponentialMovingAverage
from src.device import device_name
from src.memory import free_memory, peak_memory, used_memory
from src.model.architectures import count_parameters
from src.model.flops import flops_per_token
from src.runs.record import read_record, recorded_runs
from src.training.trial import Memory, StepTimes, forecast_memory, measure_step

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from src.data.datamodule import TextDataModule
    from src.training.config import TrainConfig

# What the C library's heap cannot use again between buffers that come and go, in shares of the largest tensor and of
# the gradients: fitted to the measured peaks in tests/README.md.
HEAP_LOSS = (1.6, 0.6)
RUNS_READ = 200  # in search of one with the same model and batch
# Tokens per parameter (Hoffmann et al. 2022), per step (Brown et al. 2020, the smallest model), and of a split.
COMPUTE_OPTIMAL, USUAL_STEP, SMALL_SPLIT = 20, 500_000, 10_000


class Plan(NamedTuple):
    """``parameters`` is their number; ``lines`` are those of the start card."""

    parameters: int
    lines: dict[str, str]


def make_plan(config: TrainConfig, trainer: Trainer, data: TextDataModule, steps: float, folder: Path) -> Plan:
    """The plan of a run of ``steps`` optimizer steps in ``folder``. With ``dry_run=measure`` some steps are made.

    Raises:
        MemoryError: a step needs more memory than is free.
        ValueError: ``folder`` has no room for two checkpoints, the one that is kept and the next one.
    """
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    parameters = count_parameters(config.model)
    memory = forecast_memory(config, device.type, precision)
    averaged = any(isinstance(one, ExponentialMovingAverage) for one in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    averages = memory.weights * averaged
    lines = {"memory": _memory_line(memory, trainer, config, averages)}
    needed, room = 2 * (memory.weights + memory.optimizer + averages), shutil.disk_usage(folder).free
    if trainer.checkpoint_callbacks:
        lines["disk"] = f"{_gb(needed)} for two checkpoints, {_gb(room)} are free"
    if trainer.checkpoint_callbacks and room < needed:
        raise ValueError(
            f"{folder} has {_gb(room)} free, two checkpoints take {_gb(needed)}; free some space, or use "
            f"hydra.run.dir=<a folder on another disk> or trainer.enable_checkpointing=false"
        )
    times = measure_step(config, device.type, precision) if config.dry_run == "measure" else None
    if times:
        seconds = f"{times.batch:.3g} s per batch, {times.update:.3g} s per update"
        lines["measured"] = f"{seconds}, {_gb(peak_memory())} at the peak"
    if math.isfinite(steps):
        step = data.windows_per_step * config.context_length
        tokens = int(steps) * step
        flops = tokens * flops_per_token(config.model, config.context_length)
        lines["tokens"] = f"{tokens:,} in all, {tokens / parameters:.2g} per parameter; {flops:.2g} operations"
        lines["time"] = _time_line(config, trainer, data, int(steps), times)
        val = len(data.val_windows) * config.context_length
        if small := _small(step, tokens / parameters, val):
            lines["note"] = f"far below the usual: {', '.join(small)}"
    return Plan(parameters, lines)


def _memory_line(memory: Memory, trainer: Trainer, config: TrainConfig, averages: int) -> str:
    device, ranks = trainer.strategy.root_device, 1
    if config.trainer.strategy == "fsdp":
        return "not forecast for fsdp"
    if device.type == "cpu":
        ranks = trainer.num_devices  # which share the memory
    more = averages + (memory.gradients if trainer.world_size > 1 else 0)  # DistributedDataParallel's buckets
    step, free = (memory.peak + more) * ranks, free_on(device)
    if free is not None and step > free:
        kept = (memory.weights + memory.gradients + memory.optimizer) * ranks
        cure = "; use a smaller model, or trainer=fsdp on several GPUs" if kept > free else ""
        raise MemoryError(f"a training step needs {_gb(step)}, {_gb(free)} are free{cure}")
    needed = needed_memory(memory, device.type) + more
    verdict = "" if free is None else f", {_gb(free)} are free"
    if free is not None and needed * ranks > free:
        verdict += ", which may not be enough"
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations")}
    shown = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items())
    total = needed + (used_memory() if device.type == "cpu" else 0)
    return f"about {_gb(total)} at the peak{verdict} ({shown}, largest tensor {_gb(memory.largest)})"


def needed_memory(memory: Memory, device: str) -> float:
    """Bytes that a training step adds to a process, with what the allocator cannot use."""
    lost = HEAP_LOSS[0] * memory.largest + HEAP_LOSS[1] * memory.gradients if device == "cpu" else 0
    return memory.peak + lost


def free_on(device: torch.device) -> int | None:
    """Bytes that ``device`` has free; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if device.type == "cpu" else None


def _time_line(config: TrainConfig, trainer: Trainer, data: TextDataModule, steps: int, times: StepTimes | None) -> str:
    """The time of all steps and evaluations, as measured, or at the speed of the last run with the same model, batch
    and device."""
    batches = steps * trainer.accumulate_grad_batches
    evaluations = steps // config.eval.resolved_every_steps(steps, data.steps_per_epoch) + 1
    evaluated = evaluations * sum(map(len, data.evaluated_windows())) / data.windows_per_batch  # batches
    if config.trainer.limit_val_batches == 0:
        evaluated = 0
    if times:
        seconds = batches * times.batch + steps * times.update + evaluated * times.evaluation
        return f"about {timedelta(seconds=round(seconds))} by the measured steps"
    now = _speed({
        "config": config.model_dump(mode="json"),
        "device": device_name(trainer.strategy.root_device),
        "precision": str(trainer.precision),
    })  # fmt: skip
    for folder in recorded_runs()[:RUNS_READ]:
        record = read_record(folder)
        rate = record.get("tokens_per_second")
        if rate and _speed(record) == now:
            tokens = (batches + evaluated / 3) * data.windows_per_batch * config.context_length
            return f"about {timedelta(seconds=round(tokens / rate))} at the {rate:,.0f} tokens/s of {folder}"
    return "not known; dry_run=measure measures it"


def _speed(record: dict[str, Any]) -> list[Any]:
    """What the speed of a run depends on."""
    config = record.get("config", {})
    sections = {"data": ("batch_size", "context_length"), "optimizer": ("name",), "trainer": ("devices",)}
    found = [config.get(section, {}).get(key) for section, keys in sections.items() for key in keys]
    found += [config.get(key) for key in ("kernels", "compile", "activation_checkpointing")]
    return [{**config.get("model", {}), "init": None}, record.get("device"), record.get("precision"), *found]


def _small(step: int, per_parameter: float, val: int) -> list[str]:
    """In what a run is far smaller than those of the papers."""
    found = {
        f"{step:,} tokens per step ({USUAL_STEP:,})": step < USUAL_STEP / 10,
        f"{per_parameter:.2g} tokens per parameter ({COMPUTE_OPTIMAL})": per_parameter < COMPUTE_OPTIMAL / 10,
        f"{val:,} tokens to validate on ({SMALL_SPLIT:,})": val < SMALL_SPLIT,
    }
    return [text for text, small in found.items() if small]


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
