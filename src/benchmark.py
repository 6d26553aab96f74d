"""Measure speed and memory: ``python -m src.benchmark [overrides of src.train]``. See ``conf/benchmark.yaml``."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from src.bench.config import BenchmarkConfig
from src.cli import app
from src.data.config import PrepareConfig
from src.files import write_json
from src.model.config import GPTConfig
from src.runs.record import git_revision, versions
from src.train import build_module
from src.train import find_problems as problems_of_training

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor

PROMPT = 8  # tokens
WANTED = {  # of the run that is timed: nothing but training steps
    "trainer.max_epochs": -1,
    "trainer.max_steps": 1_000_000,
    "trainer.accumulate_grad_batches": 1,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "eval.every_steps": 10_000_000,
}


def find_problems(cfg: DictConfig) -> list[str]:
    checked, found = app.check_sections(cfg, {"": BenchmarkConfig})
    found += problems_of_training(cfg)
    if cfg.weights or cfg.ckpt_path or cfg.resume:
        found.append("weights, ckpt_path and resume make no difference to speed: leave them away")
    if checked and (config := checked[""]):
        if config.output and Path(config.output).exists():
            found.append(f"output={config.output} exists: output=<a new file>")
        if config.source:
            from src.data.documents import find_sources

            try:
                find_sources(PrepareConfig(source=config.source).paths)
            except ValueError as error:
                found += str(error).splitlines()
        longest = cfg.model.context_length - PROMPT
        if "generation" in config.measure and not found and config.new_tokens > longest:
            found.append(f"new_tokens={config.new_tokens} do not fit the context: new_tokens={longest}")
    return found


def benchmark(cfg: DictConfig) -> dict[str, Any]:
    """Measure what ``cfg`` asks for, print it, and return it as it is written to ``cfg.output``.

    Raises:
        ValueError: the problems of the config; a process that ran out of memory.
    """
    if problems := find_problems(cfg):
        raise ValueError("\n".join(problems))
    import torch

    from src.device import device_name, pick_accelerator, pick_precision

    device = pick_accelerator(cfg.trainer.accelerator)
    precision = str(cfg.trainer.precision or pick_precision(device))
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": device_name(torch.device(device)),
        "system": f"{platform.system()}, {os.cpu_count()} cores",
        "versions": versions(),
        "git": git_revision(),
        "precision": precision,
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    print(f"{found['device']}, {found['system']}, PyTorch {found['versions']['torch']}, {found['date']}", flush=True)
    for name in cfg.measure:
        measure = {"training": _training, "generation": _generation, "preparation": _preparation}[name]
        found[name] = measure(cfg, device, precision)
    if cfg.output:
        write_json(Path(cfg.output), found)
    return found


def _training(cfg: DictConfig, device: str, precision: str) -> dict[str, Any]:
    import torch

    from src.bench import machine, peers
    from src.bench.rivals import Rival
    from src.bench.training import PHASES
    from src.device import device_name
    from src.model.flops import FORMULA, flops_per_token, peak_flops

    model, rounds, steps = GPTConfig(**cfg.model), cfg.rounds, cfg.steps
    context_length = cfg.data.context_length
    tokens = cfg.data.batch_size * context_length
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if precision[:2] == "16" else torch.float32
    ours = Rival("this project", _train_ours, OmegaConf.to_container(cfg))
    batches = _batches(cfg) if cfg.peers else None
    others = {name: Rival(name, peers.train, name, model, batches, cfg.peers_precision, device) for name in cfg.peers}
    hardware = Rival("the machine", machine.work, device, dtype)
    turns: dict[str, Callable[[], Any]] = {
        "bare loop": lambda: tokens * steps / ours("bare", steps),
        "Trainer": lambda: tokens * steps / ours("trainer", steps),
        **{name: (lambda rival=rival: tokens * steps / rival(steps)) for name, rival in others.items()},
        "phases": lambda: ours("phases", steps),
        "matrix rate": lambda: hardware("matrix"),
    }
    figures = _in_turn(turns, rounds)
    memory = {name: rival.close() for name, rival in {"this project": ours, **others}.items()}
    hardware.close()
    moments = [step for turn in figures.pop("phases") for step in turn]
    split = {
        phase: statistics.median(step[number + 1] - step[number] for step in moments)
        for number, phase in enumerate(PHASES)
    }
    flops = flops_per_token(model, context_length)
    rate = statistics.median(figures.pop("matrix rate"))
    known = peak_flops(device_name(torch.device(device))) if dtype == torch.bfloat16 else None
    medians = {name: statistics.median(values) for name, values in figures.items()}
    best = medians["bare loop"]
    _print_title(f"training, {cfg.data.batch_size} windows of {context_length} tokens, dropout {model.drop_rate:g}")
    for name, values in figures.items():
        own = name in ("bare loop", "Trainer")
        how = precision if own else cfg.peers_precision
        ratio = "" if name == "bare loop" else f"   {'of' if own else 'we:'} {_ratio(medians, name, own)}"
        _print_row(f"{name}, {how}", f"{_spread(values)} tokens/s{ratio}")
    _print_row("a step's " + ", ".join(split), ", ".join(f"{seconds * 1e3:.0f}" for seconds in split.values()) + " ms")
    _print_row("operations per token", f"{flops:,} = {FORMULA}")
    _print_row(f"matrix rate here, {str(dtype).removeprefix('torch.')}", f"{rate / 1e9:,.0f} GFLOP/s")
    if known:
        _print_row("the device's peak", f"{known / 1e12:,.0f} TFLOP/s, of which {best * flops / known:.2f}")
    _print_row("share of the matrix rate", f"{best * flops / rate:.2f}")
    for name, peak in memory.items():
        ratio = "" if name == "this project" else f"   we: {memory['this project'] / peak:.2f} x"
        _print_row(f"peak memory, {name}", f"{peak / 1e9:.2f} GB{ratio}")
    return {
        "tokens_per_second": figures,
        "seconds_of_a_step": split,
        "flops_per_token": flops,
        "flops_formula": FORMULA,
        "matrix_flops": rate,
        "peak_flops": known,
        "mfu": best * flops / (known or rate),
        "peak_memory": memory,
    }


def _ratio(medians: dict[str, float], name: str, own: bool) -> str:
    best = medians["bare loop"]
    return f"the bare loop {medians[name] / best:.3f}" if own else f"{best / medians[name]:.2f} x"


def _generation(cfg: DictConfig, device: str, precision: str) -> dict[str, Any]:
    import torch

    from src.bench import decoding, machine, peers
    from src.bench.rivals import Rival

    model, new_tokens = GPTConfig(**cfg.model), cfg.new_tokens
    prompt = torch.arange(PROMPT).unsqueeze(0)  # (1, T)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    ours = Rival("this project", decoding.work, model, prompt, device)
    others = {name: Rival(name, peers.generate, name, model, prompt, device) for name in cfg.peers if name != "litgpt"}
    hardware = Rival("the machine", machine.work, device, torch.float32)
    turns: dict[str, Callable[[], float]] = {}
    for name, dtype in dtypes.items():
        turns[f"this project, {name}"] = lambda dtype=dtype: new_tokens / ours(new_tokens, dtype)
    for peer, rival in others.items():
        for name, dtype in dtypes.items():
            if peer != "book" or name == "float32":
                turns[f"{peer}, {name}"] = lambda rival=rival, dtype=dtype: new_tokens / rival(new_tokens, dtype)
    turns["read rate"] = lambda: hardware("read")
    figures = _in_turn(turns, cfg.rounds)
    memory = {name: rival.close() for name, rival in {"this project": ours, **others}.items()}
    hardware.close()
    rate = statistics.median(figures.pop("read rate"))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    _print_title(f"generation, {new_tokens} tokens behind {PROMPT}, one text, greedy")
    shares = {}
    for name, values in figures.items():
        rival, dtype = name.split(", ")
        if rival == "this project":
            shares[dtype] = medians[name] * decoding.bytes_per_token(model, dtypes[dtype]) / rate
            more = f"   {shares[dtype]:.2f} of the read rate"
        else:
            more = f"   we: {medians[f'this project, {dtype}'] / medians[name]:.2f} x"
        _print_row(name, f"{_spread(values)} tokens/s{more}")
    _print_row("read rate here", f"{rate / 1e9:.1f} GB/s")
    return {
        "tokens_per_second": figures,
        "read_bytes_per_second": rate,
        "share_of_read_rate": shares,
        "peak_memory": memory,
    }


def _preparation(cfg: DictConfig, device: str, precision: str) -> dict[str, Any]:
    from src.bench import preparing
    from src.bench.rivals import Rival

    workers, size = os.cpu_count() or 1, preparing.size(cfg.source)
    rivals = {
        "this project": Rival("this project", preparing.shards, cfg.source, workers),
        "tiktoken": Rival("tiktoken", preparing.tiktoken, cfg.source, workers),
    }
    figures = _in_turn({name: (lambda rival=rival: size / rival()) for name, rival in rivals.items()}, cfg.rounds)
    memory = {name: rival.close() for name, rival in rivals.items()}
    medians = {name: statistics.median(values) for name, values in figures.items()}
    _print_title(f"preparation of {size / 1e6:,.0f} MB, {workers} threads")
    for name, values in figures.items():
        spread = _spread([value / 1e6 for value in values])
        _print_row(name, f"{spread} MB/s   peak memory {memory[name] / 1e6:,.0f} MB")
    _print_row("we, reading and writing included", f"{medians['this project'] / medians['tiktoken']:.2f} x tiktoken")
    return {"bytes_per_second": figures, "bytes": size, "peak_memory": memory}


def _in_turn(turns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What ``turns`` return: each once to warm up, then in turn, ``rounds`` times."""
    figures: dict[str, list[Any]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            figure = turn()
            if number:
                figures[name].append(figure)
    return figures


def _train_ours(connection: Connection, config: dict[str, Any]) -> None:
    """A rival: our Trainer and, between its steps, our bare loop. See :class:`~src.bench.training.Pacer`."""
    from hydra.utils import instantiate
    from lightning.pytorch import seed_everything

    from src.bench.training import Pacer
    from src.checkpoint.interruption import Interruption
    from src.device import keep_freed_memory
    from src.training.trainer import build_trainer

    cfg = OmegaConf.create(config)
    for key, value in WANTED.items():
        OmegaConf.update(cfg, key, value)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(cfg, Path(folder), Interruption())
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        seed_everything(cfg.seed, verbose=False)
        datamodule = instantiate(cfg.data)
        datamodule.setup()
        trainer.callbacks.append(Pacer(connection, datamodule))
        trainer.fit(build_module(cfg), datamodule=datamodule)


def _batches(cfg: DictConfig, count: int = 16) -> Tensor:
    """The first training batches of ``cfg``, ``(N, B, T + 1)``, as tokens."""
    import torch
    from hydra.utils import instantiate

    datamodule = instantiate(cfg.data)
    datamodule.setup()
    batches = zip(range(count), datamodule.train_dataloader(), strict=False)
    return torch.stack([torch.cat([inputs, targets[:, -1:]], dim=1) for _, (inputs, targets) in batches])


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def _print_title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _print_row(what: str, figure: str) -> None:
    print(f"  {what:<44} {figure}", flush=True)


if __name__ == "__main__":
    app.launch("benchmark", benchmark, find_problems)
