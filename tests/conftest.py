import csv
import itertools
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiktoken
import torch

from src.cli import overrides as cli
from src.model.config import GPTConfig
from src.train import Run, train

GPT2 = ("model=gpt2_tiny", "model.context_length=16")  # with the tokens of GPT-2
TINY = (*GPT2, "tokenizer=byte")
ON_CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "callbacks.text_samples.max_new_tokens=2")
WORDS = "the ferry bell rang over a brown river while nobody waited on the far side".split()
FORECASTS = {}  # of memory, by shape


def story_of(words: int) -> str:
    """A text of ``words`` words that is learnable and does not repeat itself."""
    return " ".join(WORDS[(i * i + i // 3) % len(WORDS)] for i in range(words))


def metrics_of(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.csv, empty cells left out."""
    with open(run.folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def column(run: Run, key: str) -> list[float]:
    return [row[key] for row in metrics_of(run) if key in row]


@pytest.fixture(autouse=True)
def seeded_torch() -> None:
    """The same random numbers for a test whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def a_user_of_its_own(monkeypatch, tmp_path_factory) -> None:
    """The tests sign their runs with a key of their own, and no test's command is another's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    monkeypatch.setenv("GPT2_LIGHTNING_COMMAND", "")


@pytest.fixture(autouse=True)
def forecasts_made_once(monkeypatch) -> None:
    """Runs of the same shape have the same forecast of memory, which takes a third of a tiny run's time."""
    from src.runs import plan
    from src.training.step_cost import estimate_memory

    def estimate(config, device, precision):
        parts = config.model, config.optimizer, config.data.batch_size, config.context_length, config.kernels
        key = repr((*parts, config.trainer.accumulate_grad_batches, config.activation_checkpointing, device, precision))
        if key not in FORECASTS:
            FORECASTS[key] = estimate_memory(config, device, precision)
        return FORECASTS[key]

    monkeypatch.setattr(plan, "estimate_memory", estimate)


@pytest.fixture
def spawned(tmp_path):
    """Starts ``python *arguments`` in ``tmp_path``, whose modules it finds, and kills what still runs at the end."""
    running = []

    def spawn(*arguments: str, **environment: str) -> subprocess.Popen:
        env = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
        known = os.environ.get("PYTHONPATH", "")
        env |= {"PYTHONPATH": f"{cli.CONF.parent}:{tmp_path}:{known}", "OMP_NUM_THREADS": "1", **environment}
        command, pipe = [sys.executable, *arguments], subprocess.PIPE
        running.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True))
        return running[-1]

    yield spawn
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def ranks(spawned, text):
    """Starts ``python -m src.train`` on ``text`` with two processes."""

    def start(*overrides: str, by: tuple[str, ...] = (), devices: int = 2) -> subprocess.Popen:
        arguments = [*TINY, f"data.path={text}", *ON_CPU, f"trainer.devices={devices}", *overrides]
        if any(override.startswith("resume=") for override in overrides):
            arguments = list(overrides)
        sharing = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if any("max-restarts" in one for one in by) else {}
        return spawned(*by, "-m", "src.train", *sorted(arguments, key=lambda one: one != "-m"), **sharing)

    return start


@pytest.fixture
def tiny() -> GPTConfig:
    return GPTConfig(vocab_size=101, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0)


@pytest.fixture(scope="session")
def letters() -> tiktoken.Encoding:
    """One token per byte, and end-of-text: 256."""
    return tiktoken.Encoding(
        "letters",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )


@pytest.fixture
def text(tmp_path):
    """A file of 900 bytes, the tokens of ``TINY``."""
    path = tmp_path / "text.txt"
    path.write_text(story_of(900)[:900])
    return path


@pytest.fixture
def long_text(tmp_path):
    """A file of about 900 tokens of GPT-2."""
    path = tmp_path / "long_text.txt"
    path.write_text(story_of(900))
    return path


@pytest.fixture
def tiny_run(tmp_path, text):
    """Trains gpt2_tiny on ``text`` in this process, in a new folder each time: ``tiny_run("data.stride=8")``; or goes
    on in an old one: ``tiny_run("data.stride=8", resume=folder)``."""
    numbers = itertools.count()

    def run(*overrides: str, folder: Path | None = None, resume: Path | None = None, model=TINY) -> Run:
        cfg = cli.compose(
            "train",
            [
                *model,
                f"data.path={text}",
                f"trainer.accelerator={os.environ.get('GPU_TESTS', 'cpu')}",
                "trainer.precision=32-true",
                "trainer.max_epochs=1",
                "eval.every_steps=1000",
                *overrides,
                *([f"resume={resume}"] if resume else []),
            ],
        )
        return train(cfg, resume or folder or tmp_path / f"run{next(numbers)}")

    return run


@pytest.fixture
def at_batch(monkeypatch):
    """``at_batch(7, act)`` calls ``act(module)`` once, in the middle of the training step of the eighth batch."""
    from src.training.module import PretrainingModule

    training_step = PretrainingModule.training_step

    def at(batch: int, act: Callable[[PretrainingModule], None]) -> None:
        pending = [act]

        def step(self, given, batch_idx):
            if pending and self.batch_index == batch:
                pending.pop()(self)
            return training_step(self, given, batch_idx)

        monkeypatch.setattr(PretrainingModule, "training_step", step)

    return at


FAST = ("callbacks=none", "trainer.enable_checkpointing=false", "trainer.limit_val_batches=0")


FULL = "every trial of the README's table of promises"
PASSED: dict[tuple[str, str], int] = {}


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help=FULL)


class Trials:
    """``trials(few, all)`` trials are to be made; ``trials.passed(promise, count, outcome)`` counts for the table."""

    def __init__(self, full: bool) -> None:
        self.full = full

    def __call__(self, few: int, every: int) -> int:
        return every if self.full else few

    def passed(self, promise: str, count: int, outcome: str) -> None:
        key = (promise, outcome)
        PASSED[key] = PASSED.get(key, 0) + count


@pytest.fixture
def trials(request) -> Trials:
    return Trials(request.config.getoption("--full"))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--full"):
        terminalreporter.write_line("\n| promise | figure |\n|---|---|")
        for (promise, outcome), count in PASSED.items():
            terminalreporter.write_line(f"| {promise} | {count} of {count} {outcome} |")


@pytest.fixture(scope="session")
def small_net():
    """A model with GPT-2's vocabulary whose next tokens are no toss-up: its weights are large."""
    from src.model.gpt import GPT

    torch.manual_seed(0)
    net = GPT(GPTConfig(context_length=32, emb_dim=32, n_heads=4, n_layers=2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(6)
    return net.eval()


@pytest.fixture(scope="session")
def small_weights(small_net, tmp_path_factory) -> Path:
    from src.interop.weights import save_weights

    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    save_weights(small_net, path)
    return path


@pytest.fixture
def command(monkeypatch, capfd):
    """``command("generate", "weights=x", ...)`` is ``python -m src.generate weights=x ...`` in this process: its exit
    status, stdout and stderr."""
    import logging

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [f"src/{name}.py", *arguments])
        handlers = list(logging.getLogger().handlers)
        status = 0
        try:
            with warnings.catch_warnings(action="ignore"):  # that it is imported already
                runpy.run_module(f"src.{name}", run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            logging.getLogger().handlers[:] = handlers
        return (status, *capfd.readouterr())

    return run
