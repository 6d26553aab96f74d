"""Measures this project on a GPU: ``python tests/measure_gpu.py [A] [B] [C] [P]``, all four stages by default.

A  the machine, tests/test_gpu.py, and three optimizer steps in each precision and strategy
B  the speed of a training step of GPT-2 124M
C  a run of experiment=gpt2_124m, generation, and resuming to the same bits
P  other tests

The name of a measurement instead of a stage repeats that one. Each runs in a process of its own, bounded in time; one
that fails is a line of the table and does not stop the others. ``table.md`` and ``log.txt`` are written to $OUT, by
default ``gpu_out``. ``SECONDS=570`` bounds the whole. ``DRY=1`` runs everything at toy size on a CPU.
"""

import importlib.util
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DRY = bool(os.environ.get("DRY"))
DEVICE = "cpu" if DRY else "cuda"
WORK = Path(os.environ.get("WORK", "."))  # a temporary folder, which the main process makes for the others
OUT = Path(os.environ.get("OUT", "gpu_out"))
SECONDS = float(os.environ.get("SECONDS", 3600 if DRY else 570))
Rows = Iterator[tuple[str, ...]]


class Measurement(NamedTuple):
    """``act`` takes the words of ``arguments`` and yields rows: an addition to ``name``, what was measured and, if it
    is not that of all, what is ``expected``."""

    stage: str
    name: str
    expected: str
    act: Callable[..., Rows]
    arguments: str = ""
    seconds: int = 180  # after which it is stopped
    together: bool = False  # with others, at the same time


def measurements(dry: bool) -> list[Measurement]:
    """All of them, the most informative of each stage first; those without a stage are run by name only."""
    shards, toy, small, steps = f"data.path={WORK / 'shards'}", "", "model=gpt2_small rounds=2", 20
    if dry:
        toy = "model.emb_dim=64 model.n_heads=1 model.n_layers=2 model.context_length=64 tokens_per_step=512"
        toy, small, steps = f"{toy} compile=false", "model=gpt2_tiny rounds=1", 4

    def gpt2(windows: int, more: str = "") -> str:
        batch = f"data.batch_size={windows // 16 if dry else windows} data.num_workers=0"
        return f"experiment=gpt2_124m {shards} {batch} {toy} {more}"

    def three(expected: str, more: str) -> Measurement:
        return Measurement(
            "A", f"three steps, {more}", expected, losses, f"debug=fast eval.batches=1 {more}", together=True
        )

    def stopped(name: str, expected: str, more: str) -> Measurement:
        model = f"{small.split()[0]} model.n_layers=4 model.tie_weights=true data=shards {shards}"
        length = f"data.batch_size={2 if dry else 8} trainer.max_steps={15 * steps} trainer.accumulate_grad_batches=2"
        length += " eval.every_steps=150 eval.batches=1 callbacks.text_samples.max_new_tokens=4 ~callbacks.loss_plot"
        return Measurement("C", f"resumed, {name}", expected, resume, f"{model} {length} {more}", 240, True)

    few = "measure=[training] rounds=1 steps=2"
    run = f"schedule.warmup_steps=2 trainer.log_every_n_steps=1 trainer.max_steps={steps} eval.batches=1"
    run += " eval.every_steps=1000 callbacks.text_samples.max_new_tokens=8"
    against = f"measure=[generation] peers=[transformers] {small} model.context_length=512"
    of_gpu = "generate evaluate tokenizer_choice training checkpoint finite_guard resume"
    of_cpu = "kernels model optim generation"
    if dry:
        of_gpu, of_cpu = "device", "optim"
    return [
        Measurement("ABCP", "device", "", device),
        Measurement("A", "machine", "", machine),
        Measurement("A", "tests/test_gpu.py", "no failures", tests, "gpu", 400, True),
        three("10.8, falling", "trainer.precision=32-true"),
        three("10.8, falling", "trainer.precision=bf16-mixed"),
        three("10.8, falling", "trainer.precision=16-mixed"),
        three("10.8, falling", "trainer.precision=bf16-true"),
        three("10.8, falling", "optimizer=muon"),
        three("as bf16-mixed", "compile=true activation_checkpointing=true"),
        three("as bf16-mixed", "trainer=ddp trainer.devices=1"),
        three("as bf16-mixed", "trainer=fsdp trainer.devices=1 compile=true"),
        three("as bf16-mixed", "trainer.deterministic=true"),
        Measurement("B", "benchmark", "485k to 540k on an H200, 10 % less on an H100", benchmark, gpt2(64, few)),
        Measurement("B", "benchmark, flash", "6 to 8 % less", benchmark, gpt2(64, f"{few} attention=flash")),
        Measurement("B", "loop", "as the bare loop", loop, gpt2(64)),
        Measurement("B", "loop, compiled cross-entropy", "465k to 510k", loop, gpt2(64, "kernels=plain compile=false")),
        Measurement("B", "loop, 16 windows", "440k to 490k", loop, gpt2(16)),
        Measurement("B", "loop, 16 windows, eager", "300k to 380k", loop, gpt2(16, "compile=false")),
        Measurement("", "loop, 32 windows", "within 1 % of 64 windows", loop, gpt2(32)),
        Measurement("C", "experiment=gpt2_124m", "0.98 of the bare loop", trainer, gpt2(64, run)),
        Measurement("C", "generation, bfloat16", "400 tokens/s, the first time too", generation, "bfloat16"),
        Measurement("C", "generation, float32", "400 tokens/s", generation, "float32"),
        Measurement("C", "generation, transformers", "", benchmark, against),
        stopped("deterministic", "the same bits", "trainer.deterministic=true"),
        stopped("deterministic, compiled", "the same bits", "trainer.deterministic=true compile=true"),
        stopped("not deterministic", "differs: atomic additions", ""),
        Measurement("P", "tests on the GPU", "no failures but of tolerance", tests, of_gpu, 240, True),
        Measurement("P", "tests on the CPU", "no failures", tests, of_cpu, 240, True),
    ]


# A measurement, in its own process


def execute(module: str, overrides: tuple[str, ...], key: str) -> Path:
    """``python -m module overrides``, with a new path as the value of ``key``, which is returned."""
    new = Path(tempfile.mkdtemp(dir=WORK), "new")
    print("+ python -m", module, shlex.join(overrides), flush=True)
    subprocess.run([sys.executable, "-m", module, *overrides, f"{key}={new}"], check=True)
    return new


def device() -> Rows:
    import torch

    from src.device import device_name
    from src.runs.record import git_revision, versions

    found = {**versions(), "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(), "git": git_revision()}
    yield "", ", ".join([device_name(torch.device(DEVICE)), *(f"{what} {one}" for what, one in found.items() if one)])


def machine() -> Rows:
    """On random numbers: a GPU multiplies zeros and ones faster."""
    import torch
    from torch.nn.attention import SDPBackend

    from src.device import shortest_seconds

    size = 512 if DRY else 8192
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    rate = 2 * size**3 / shortest_seconds(lambda: a @ b, DEVICE)
    yield "bfloat16 matrix products", f"{rate / 1e12:.3g} TFLOP/s", "790 TFLOP/s"
    x, y = torch.randn(2, size, 16 * size, device=DEVICE)
    rate = 2 * x.nbytes / shortest_seconds(lambda: y.copy_(x), DEVICE)
    yield "copies, bytes read and written", f"{rate / 1e12:.3g} TB/s", "3.0 on an H100, 4.3 on an H200"
    q = torch.randn(4, 12, 1024, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True))
    yield "attention of training", str(chosen).split(".")[-1], "CUDNN_ATTENTION"


def tests(*names: str) -> Rows:
    command = ["pytest", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in names)]
    if DRY:
        command += ["-k", "not compile"]  # which takes minutes
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "4"]
    print("+ python -m", *command, flush=True)
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    *lines, last = done.stdout.splitlines()
    yield "", last
    yield from (("", line) for line in lines if line.startswith(("FAILED ", "ERROR ")))


def losses(*overrides: str) -> Rows:
    rows = logged(overrides)
    yield "", " ".join(f"{float(row['train/loss']):.3f}" for row in rows if row["train/loss"])


def trainer(*overrides: str) -> Rows:
    rows = [row for row in logged(overrides) if row.get("perf/tokens_per_second")]
    keys, late = ("perf/tokens_per_second", "perf/mfu"), rows[len(rows) // 3 :]
    rate, share = (statistics.median(float(row[key]) for row in late) for key in keys)
    yield "", f"{rate:,.0f} tokens/s, MFU {share:.3f}, loss {float(late[-1]['train/loss']):.3f}"


def logged(overrides: tuple[str, ...]) -> list[dict[str, str]]:
    from interrupting import rows_of

    return rows_of(execute("src.train", overrides, "hydra.run.dir") / "metrics.csv")


def benchmark(*overrides: str) -> Rows:
    found = json.loads(execute("src.benchmark", overrides, "output").read_text())
    figures = found.get("training") or found["generation"]
    rates = {name: statistics.median(rounds) for name, rounds in figures["tokens_per_second"].items()}
    for name, rate in rates.items():
        ratio = rate / next(iter(rates.values()))
        row = name, f"{rate:,.0f} tokens/s" + (f", {ratio:.3f} of {next(iter(rates))}" if ratio != 1 else "")
        yield (*row, "0.98") if name == "Trainer" else row
    if share := figures.get("mfu"):
        memory = figures["peak_memory"]["this project"] / 2**30
        yield "MFU, peak memory", f"{share:.3f}, {memory:.1f} GiB", "0.42 to 0.45"


def loop(*overrides: str) -> Rows:
    """A training loop as a plain script has it, its input pipeline alone, and the kernels that take the most time. With
    kernels=plain, torch.compile gets the model, the head and the cross-entropy as one function."""
    import torch
    from torch.nn import functional as F

    from src.bench.training import data_of
    from src.cli.overrides import compose
    from src.device import device_name, in_precision, seconds_of
    from src.memory import peak_memory
    from src.model.flops import flops_per_token, peak_flops
    from src.train import check
    from src.training.optim import build_optimizer
    from src.training.trainer import build_module

    config = check(compose("train", list(overrides)))
    ours, parts = config.kernels == "fast", config.accumulated(1).trainer.accumulate_grad_batches
    module = build_module(config, DEVICE).to(DEVICE)
    optimizer, batches = build_optimizer(module.net, config.optimizer), iter(data_of(config).train_dataloader())
    plain = torch.compile(lambda x, y: F.cross_entropy(module.net(x).flatten(0, 1).float(), y.flatten()))

    def step() -> None:
        for _ in range(parts):
            x, y = (tensor.to(DEVICE, non_blocking=True) for tensor in next(batches))
            with in_precision("bf16-mixed", DEVICE)[1]:
                loss = (module.loss if ours else plain)(x, y)
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    first = seconds_of(step, DEVICE)
    rate = config.tokens_per_step / statistics.median(seconds_of(step, DEVICE) for _ in range(4))
    peak = peak_flops(device_name(torch.device(DEVICE)))
    share = f"MFU {rate * flops_per_token(config.model, config.context_length) / peak:.3f}, " if peak else ""
    yield "", f"{rate:,.0f} tokens/s, {share}{peak_memory() / 2**30:.1f} GiB, first step {first:.0f} s"
    seconds = seconds_of(lambda: [next(batches) for _ in range(10 * parts)], DEVICE)
    yield "input pipeline alone", f"{10 * config.tokens_per_step / seconds:,.0f} tokens/s", "35M tokens/s"
    with torch.profiler.profile() as profile:
        seconds_of(step, DEVICE)
    time_of = attrgetter("self_cpu_time_total" if DRY else "self_device_time_total")
    events = [one for one in profile.key_averages() if not one.is_user_annotation]
    kernels = [one for one in events if one.device_type.name == DEVICE.upper()]
    total = sum(map(time_of, kernels))
    for one in sorted(kernels, key=time_of, reverse=True)[:6]:
        yield one.key[:70], f"{time_of(one) / total:.1%}, {one.count} calls, {time_of(one) / 1e3:.1f} ms", ""


def generation(dtype: str) -> Rows:
    """One text, greedy."""
    import torch

    from src.device import seconds_of
    from src.generation.decode import generate
    from src.model.config import GPTConfig
    from src.model.gpt import GPT

    sizes = {"emb_dim": 64, "n_heads": 1, "n_layers": 2} if DRY else {}
    config = GPTConfig(context_length=1024, qkv_bias=True, tie_weights=True, **sizes)
    net = GPT(config).to(DEVICE, getattr(torch, dtype)).eval()
    prompt, new = torch.arange(100, 108, device=DEVICE).unsqueeze(0), 16 if DRY else 256

    def act(recorded: bool = False) -> torch.Tensor:
        return generate(net, prompt, new, cuda_graph=recorded)[0]

    reference = None
    for name, form in {"eager": act, "CUDA graph": lambda: act(True)}.items():
        first, again = (new / seconds_of(form, DEVICE) for _ in range(2))
        text = form()
        reference = text if reference is None else reference
        differ = (text != reference).nonzero().flatten().tolist()
        same = f"other tokens from the {differ[0] - 7}th on" if differ else "the same tokens"
        row = name, f"{first:,.0f}, then {again:,.0f} tokens/s, {same}"
        yield (*row, "1,300 tokens/s in bfloat16") if name == "CUDA graph" else row


def resume(*overrides: str) -> Rows:
    """Whether a run that SIGTERM stops, resumed, is the same as one that was not stopped; else where it differs."""
    from interrupting import first_difference, interrupt

    print("+ python -m src.train", shlex.join(overrides), flush=True)
    folder = Path(tempfile.mkdtemp(dir=WORK))
    try:
        (status,) = interrupt(folder, list(overrides), kills=1, signals=["TERM"], seed=7)
        yield "", "the same bits" if status == 143 else f"was not stopped: exit status {status}"
    except AssertionError:
        found = first_difference(folder / "uninterrupted", folder / "interrupted")
        if found is None:
            raise
        yield "", f"differs, first at {found}"


# All measurements, from the main process


def make_shards(folder: Path) -> None:
    """Of random tokens, as frequent as words are (Zipf's law)."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from src.data.shards import header

    folder.mkdir()
    share = 1 / np.arange(1, 50257)
    for role, count in ("val", 10**5 if DRY else 10**6), ("train", 10**6 if DRY else 2 * 10**7):
        tokens = np.random.default_rng(count).choice(len(share), count, p=share / share.sum())
        (folder / f"random_{role}_000000.bin").write_bytes(header(count) + tokens.astype("<u2").tobytes())


def measure(one: Measurement, work: Path, limit: float) -> tuple[list[list[str]], str, str]:
    """The rows of ``one``, its command and its output."""
    environment = {"WORK": str(work), "XDG_STATE_HOME": str(work), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    environment |= {"CUDA_VISIBLE_DEVICES": "", "GPU_TESTS": "cpu"} if DRY else {"GPU_TESTS": "cuda"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        given = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "process_group": 0}
        command = [sys.executable, __file__, "--here", one.name]
        process, status = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **given), None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
        log.seek(0)
        output = log.read()
    lines = output.splitlines()
    rows = [json.loads(line[3:]) for line in lines if line.startswith("=> ")]
    if status != 0:
        error = next((line.strip() for line in reversed(lines) if "rror" in line), "")
        reason = f"stopped after {limit:.0f} s" if status is None else f"exit status {status}: {error[:120]}"
        rows.append([one.name, f"FAILED, {reason}", one.expected])
    shown = next((line[2:] for line in lines if line.startswith("+ ")), None)
    shown = (shown or f"python tests/measure_gpu.py {shlex.quote(one.name)}").replace(f"{work}/", "my_")
    return rows, shown, output


def main(chosen: list[str]) -> None:
    known = measurements(DRY)
    if unknown := set(chosen) - {*"ABCP", *(one.name for one in known)}:
        sys.exit(f"{', '.join(unknown)}: neither A, B, C, P nor one of\n" + "\n".join(one.name for one in known))
    wanted = [one for one in known if {*one.stage, one.name} & set(chosen or "ABCP")]
    OUT.mkdir(parents=True, exist_ok=True)
    if "OUT" not in os.environ:
        (OUT / ".gitignore").write_text("*\n")
    table, log, lock, end = OUT / "table.md", OUT / "log.txt", threading.Lock(), time.monotonic() + SECONDS
    table.write_text(f"{date.today()}\n\n| what | measured | expected | seconds | command |\n|---|---|---|---|---|\n")
    log.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder, "shards"))

        def report(one: Measurement) -> None:
            started = time.monotonic()
            rows, command, output = [[one.name, f"not run, {SECONDS:.0f} s are over", one.expected]], "", ""
            if end - started > 10:
                rows, command, output = measure(one, Path(folder), min(one.seconds * (4 if DRY else 1), end - started))
            took = f"{time.monotonic() - started:.0f}"
            with lock, table.open("a") as lines, log.open("a") as outputs:
                for row in rows:
                    print(f"{row[0]:<62} {row[1]:<58} {row[2]}", flush=True)
                    cells = (cell.replace("|", "/") for cell in (*row, took, f"`{command}`"))
                    lines.write(f"| {' | '.join(cells)} |\n")
                outputs.write(f"\n==== {one.name}\n{output}")

        for together, group in itertools.groupby(wanted, key=lambda one: one.together):
            with ThreadPoolExecutor((2 if DRY else 4) if together else 1) as pool:
                list(pool.map(report, group))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        (one,) = (one for one in measurements(DRY) if one.name == sys.argv[2])
        for addition, *row in one.act(*shlex.split(one.arguments)):
            name = f"{one.name}: {addition}" if addition else one.name
            print("=> " + json.dumps([name, *row, one.expected][:3]), flush=True)
    else:
        main(sys.argv[1:])
