"""What a run is going to take: memory, disk, tokens, FLOPs and time, known before its model is allocated."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src.device import device_name, free_on
from src.memory import peak_memory, used_memory
from src.model.flops import flops_per_token
from src.runs import processes
from src.runs.record import read_record, recorded_runs
from src.runs.report import flat
from src.training.step_cost import Memory, StepTimes, estimate_memory, measure_step

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from src.data.datamodule import TextDataModule
    from src.training.config import TrainConfig

# On a CPU: fragmentation of the C library's heap in shares of the largest tensor and of the gradients, and bytes of
# what is imported later; fitted to the measured peaks in tests/README.md.
FRAGMENTATION, IMPORTS = (0.35, 0.75), 150e6
SPEED = ("kernels", "compile", "activation_checkpointing", "data.batch_size", "data.context_length", "optimizer.name")
SPEED += ("trainer.devices", "trainer.num_nodes", "trainer.strategy")
RUNS_READ = 200  # in search of one with the same model and batch
# Tokens per parameter (Hoffmann et al. 2022), per step (Brown et al. 2020, the smallest model), and of a split.
COMPUTE_OPTIMAL, USUAL_STEP, SMALL_SPLIT = 20, 500_000, 10_000
CHECKPOINTS = 4  # best, last, the one before it, and the one that is being written


def make_plan(
    config: TrainConfig, trainer: Trainer, data: TextDataModule, steps: float, done: int, parameters: int
) -> dict[str, str]:
    """The lines of the start card about what a run of ``steps`` optimizer steps takes, of which ``done`` are made. With
    ``dry_run=measure`` some steps are timed.

    Raises:
        MemoryError: a step needs more memory than is free.
        ValueError: the run folder has no room for two checkpoints, the one that is kept and the next one.
    """
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    lines, checkpoint = {}, 12 * parameters
    try:
        memory = estimate_memory(config, device.type, precision)
    except Exception as error:  # of a model of the user's own, which cannot run without data
        lines["memory"] = f"not estimated ({type(error).__name__})"
    else:
        lines["memory"] = _memory_line(memory, device, config)
        checkpoint = memory.weights + memory.optimizer + _averages(config, parameters)
    if trainer.checkpoint_callbacks:
        lines["disk"] = _disk_line(checkpoint, Path(trainer.default_root_dir))
    times = measure_step(config, device, precision) if config.dry_run == "measure" else None
    if times:
        seconds = f"{times.batch:.3g} s per batch, {times.update:.3g} s per optimizer step"
        lines["measured"] = f"{seconds}, {_gb(peak_memory())} at the peak"
    if math.isfinite(steps):
        step = data.windows_per_step * config.context_length
        tokens = int(steps) * step
        flops = tokens * flops_per_token(config.model, config.context_length)
        lines["tokens"] = f"{tokens:,} in all, {tokens / parameters:.2g} per parameter; {flops:.2g} FLOPs"
        lines["time"] = _time_line(config, trainer, data, int(steps), done, times)
        val = len(data.val_windows) * config.context_length
        if small := _small(step, tokens / parameters, val):
            lines["note"] = f"far below the usual: {', '.join(small)}"
    return lines


def _memory_line(memory: Memory, device: torch.device, config: TrainConfig) -> str:
    if config.trainer.strategy == "fsdp":
        return "not estimated for fsdp"
    free, on_cpu = free_on(device), device.type == "cpu"
    step, lost = needed_memory(memory, device.type, config)
    kept = memory.weights + memory.gradients + memory.optimizer
    certain = step if on_cpu and not config.compile else kept
    if free is not None and certain > free:
        cure = "; use a smaller model, or trainer=fsdp on several GPUs" if kept > free else ""
        raise MemoryError(f"a training step needs {_gb(certain)}, {_gb(free)} are free{cure}")
    verdict = "" if free is None else f", {_gb(free)} are free"
    if free is not None and step + lost > free:
        verdict += ", which may not be enough"
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations")}
    parts["largest tensor"] = memory.largest
    shown = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    total = step + lost + (used_memory() if on_cpu else 0)
    return f"about {_gb(total)} at the peak{verdict}; {shown}"


def needed_memory(memory: Memory, device: str, config: TrainConfig) -> tuple[int, float]:
    """Bytes that a training step adds to the processes that share the memory of ``device``, and what fragmentation of
    the heap may add."""
    on_cpu, ranks = device == "cpu", processes.world_size()
    # with DistributedDataParallel gradients stay, as they do in any case while they accumulate
    buckets = memory.gradients if ranks > 1 and config.trainer.accumulate_grad_batches == 1 else 0
    step = memory.peak + buckets + _averages(config, memory.weights // 4)
    lost = FRAGMENTATION[0] * memory.largest + FRAGMENTATION[1] * memory.gradients + IMPORTS if on_cpu else 0
    sharing = max(ranks // config.trainer.num_nodes, 1) if on_cpu else 1
    return step * sharing, lost * sharing


def _averages(config: TrainConfig, parameters: int) -> int:
    """Bytes of the averaged weights of ``callbacks=ema``."""
    return 4 * parameters if config.callbacks.get("ema") else 0


def _disk_line(checkpoint: int, folder: Path) -> str:
    found = (*folder.glob("checkpoints/*.ckpt"), *folder.glob("checkpoints/*.ckpt/*"))  # replaced one by one
    files = [file.stat() for file in found]
    own = sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())
    room = shutil.disk_usage(folder).free
    if room + own < 2 * checkpoint:
        raise ValueError(
            f"{folder} has {_gb(room)} free, two checkpoints take {_gb(2 * checkpoint)}; free some space, or use "
            f"hydra.run.dir=<a folder on another disk> or trainer.enable_checkpointing=false"
        )
    return f"up to {_gb(CHECKPOINTS * checkpoint)} for checkpoints of {_gb(checkpoint)}, {_gb(room)} are free"


def _time_line(
    config: TrainConfig, trainer: Trainer, data: TextDataModule, total: int, done: int, times: StepTimes | None
) -> str:
    """The time of the steps of a run of ``total`` that are not ``done``, and of their evaluations, as measured, or at
    the speed of the last run with the same model, batch and device."""
    steps = total - done
    batches = steps * trainer.accumulate_grad_batches
    evaluations = math.ceil(steps / config.eval.resolved_every_steps(total, data.steps_per_epoch)) + 1
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


def _speed(record: dict[str, Any]) -> list[Any] | None:
    """What the speed of a run depends on; None of a damaged record."""
    with suppress(AttributeError, TypeError):
        config = dict(flat(record.get("config", {})))
        model = {key: value for key, value in config.items() if key.startswith("model.") and key != "model.init"}
        return [model, record.get("device"), record.get("precision"), *(config.get(key) for key in SPEED)]


def _small(step: int, per_parameter: float, val: int) -> list[str]:
    """In what a run is far smaller than those of the papers."""
    found = {
        f"{step:,} of {USUAL_STEP:,} tokens per step": step < USUAL_STEP / 10,
        f"{per_parameter:.2g} of {COMPUTE_OPTIMAL} tokens per parameter": per_parameter < COMPUTE_OPTIMAL / 10,
        f"{val:,} of {SMALL_SPLIT:,} tokens to validate on": val < SMALL_SPLIT,
    }
    return [text for text, small in found.items() if small]


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
