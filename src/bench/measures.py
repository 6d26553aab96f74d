"""The three measurements. Each program runs in a process of its own, all are timed in turn, and a table is printed."""

import os
import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from src.bench import decoding, machine, peers, preparing, training
from src.bench.config import PROMPT, BenchmarkConfig
from src.bench.rivals import Rival, in_turn
from src.device import device_name
from src.model.flops import FORMULA, flops_per_token, peak_flops

OURS, MACHINE = "this project", "the machine"
BATCHES = 16  # that the peers repeat

Built = Callable[..., list[Any]]  # makes objects of nodes with a _target_


def measure_training(config: BenchmarkConfig, device: str, precision: str, built: Built) -> dict[str, Any]:
    """Tokens per second of our Trainer, of a bare loop over the same model, and of the peers; the phases of a step; the
    share of the machine's matrix products; peak memory."""
    length, steps, accumulate = config.context_length, config.steps, config.trainer.accumulate_grad_batches
    tokens = steps * accumulate * config.data.batch_size * length
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if precision[:2] == "16" else torch.float32
    ours = Rival(OURS, training.work, config, built)
    batches = _batches(config) if config.peers else None
    others = {
        name: Rival(name, peers.train, name, config.model, batches, accumulate, config.peers_precision, device)
        for name in config.peers
    }
    hardware = Rival(MACHINE, machine.work, device, dtype)
    turns: dict[str, Callable[[], Any]] = {
        "bare loop": lambda: tokens / ours("bare", steps),
        "Trainer": lambda: tokens / ours("trainer", steps),
        **{name: (lambda rival=rival: tokens / rival(steps)) for name, rival in others.items()},
        "phases": lambda: ours("phases", steps),
        "matrix rate": lambda: hardware("matrix"),
    }
    figures = in_turn(turns, config.rounds)
    memory = _memory({OURS: ours, **others})
    hardware.close()
    phases = _phases(figures.pop("phases"))
    rate = statistics.median(figures.pop("matrix rate"))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    best = medians["bare loop"]
    flops = flops_per_token(config.model, length)
    known = peak_flops(device_name(torch.device(device))) if dtype == torch.bfloat16 else None

    batches_per_step = f"{accumulate} micro-batch{'es' * (accumulate > 1)} of {config.data.batch_size} windows"
    _title(f"training, steps of {batches_per_step} of {length} tokens, dropout {config.model.drop_rate:g}")
    _row(f"bare loop, {precision}", f"{_spread(figures['bare loop'])} tokens/s")
    ratio = medians["Trainer"] / best
    _row(f"Trainer, {precision}", f"{_spread(figures['Trainer'])} tokens/s   of the bare loop {ratio:.3f}")
    for name in others:
        ratio = best / medians[name]
        _row(f"{name}, {config.peers_precision}", f"{_spread(figures[name])} tokens/s   we: {ratio:.2f} x")
    _row("a step's " + ", ".join(phases), ", ".join(f"{seconds * 1e3:.0f}" for seconds in phases.values()) + " ms")
    _row("operations per token", f"{flops:,} = {FORMULA}")
    _row(f"matrix rate here, {str(dtype).removeprefix('torch.')}", f"{rate / 1e9:,.0f} GFLOP/s")
    if known:
        _row("the device's peak", f"{known / 1e12:,.0f} TFLOP/s, of which {best * flops / known:.2f}")
    _row("share of the matrix rate", f"{best * flops / rate:.2f}")
    for name, peak in memory.items():
        ratio = "" if name == OURS else f"   we: {memory[OURS] / peak:.2f} x"
        _row(f"peak memory, {name}", f"{peak / 1e9:.2f} GB{ratio}")
    return {
        "tokens_per_second": figures,
        "seconds_of_a_step": phases,
        "flops_per_token": flops,
        "flops_formula": FORMULA,
        "matrix_flops": rate,
        "peak_flops": known,
        "mfu": best * flops / (known or rate),
        "peak_memory": memory,
    }


def measure_generation(config: BenchmarkConfig, device: str, precision: str, built: Built) -> dict[str, Any]:
    """Tokens per second of greedy decoding in float32 and bfloat16, ours and the peers', and the share of the rate at
    which the machine reads memory; peak memory."""
    model, new_tokens = config.model, config.new_tokens
    prompt = torch.arange(PROMPT).unsqueeze(0)  # (1, T)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    ours = Rival(OURS, decoding.work, model, prompt, device)
    rivals = {OURS: ours}
    for name in config.peers:
        if name != "litgpt":
            rivals[name] = Rival(name, peers.generate, name, model, prompt, device)
    hardware = Rival(MACHINE, machine.work, device, torch.float32)
    turns: dict[str, Callable[[], float]] = {}
    for name, rival in rivals.items():
        for kind, dtype in dtypes.items():
            if name != "book" or kind == "float32":
                turns[f"{name}, {kind}"] = lambda rival=rival, dtype=dtype: new_tokens / rival(new_tokens, dtype)
    if device == "cuda":
        for kind, dtype in dtypes.items():
            turns[f"{OURS}, {kind}, CUDA graph"] = lambda dtype=dtype: new_tokens / ours(new_tokens, dtype, True)
    turns["read rate"] = lambda: hardware("read")
    figures = in_turn(turns, config.rounds)
    memory = _memory(rivals)
    hardware.close()
    rate = statistics.median(figures.pop("read rate"))
    medians = {name: statistics.median(values) for name, values in figures.items()}

    _title(f"generation, {new_tokens} tokens after {PROMPT}, one text, greedy")
    shares = {}
    for name, values in figures.items():
        who, kind = name.split(", ", 1)
        if who == OURS:
            shares[kind] = medians[name] * decoding.bytes_per_token(model, dtypes[kind.split(",")[0]]) / rate
            more = f"   {shares[kind]:.2f} of the read rate"
        else:
            more = f"   we: {medians[f'{OURS}, {kind}'] / medians[name]:.2f} x"
        _row(name, f"{_spread(values)} tokens/s{more}")
    _row("read rate here", f"{rate / 1e9:.1f} GB/s")
    return {
        "tokens_per_second": figures,
        "read_bytes_per_second": rate,
        "share_of_read_rate": shares,
        "peak_memory": memory,
    }


def measure_preparation(config: BenchmarkConfig, device: str, precision: str, built: Built) -> dict[str, Any]:
    """Bytes of ``config.source`` tokenized per second into shards, and by tiktoken in memory; peak memory."""
    assert config.source is not None
    workers, size = os.cpu_count() or 1, preparing.size(config.source)
    rivals = {
        OURS: Rival(OURS, preparing.shards, config.source, workers),
        "tiktoken": Rival("tiktoken", preparing.tiktoken, config.source, workers),
    }
    figures = in_turn({name: (lambda rival=rival: size / rival()) for name, rival in rivals.items()}, config.rounds)
    memory = _memory(rivals)
    medians = {name: statistics.median(values) for name, values in figures.items()}

    _title(f"preparation of {size / 1e6:,.0f} MB, {workers} threads")
    for name, values in figures.items():
        spread = _spread([value / 1e6 for value in values])
        _row(name, f"{spread} MB/s   peak memory {memory[name] / 1e6:,.0f} MB")
    _row("we, reading and writing included", f"{medians[OURS] / medians['tiktoken']:.2f} x tiktoken")
    return {"bytes_per_second": figures, "bytes": size, "peak_memory": memory}


MEASURES = {"training": measure_training, "generation": measure_generation, "preparation": measure_preparation}


def _batches(config: BenchmarkConfig) -> Tensor:
    """The first training batches as tokens, ``(N, B, T + 1)``."""
    batches = islice(training.data_of(config).train_dataloader(), BATCHES)
    return torch.stack([torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in batches])


def _phases(turns: list[list[dict[str, float]]]) -> dict[str, float]:
    """The median seconds of each phase of a step."""
    return {phase: statistics.median(step[phase] for turn in turns for step in turn) for phase in training.PHASES}


def _memory(rivals: dict[str, Rival]) -> dict[str, int]:
    return {name: rival.close() for name, rival in rivals.items()}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _row(what: str, figure: str) -> None:
    print(f"  {what:<44} {figure}", flush=True)
