"""What is measured is what is said to be measured."""

import json
import statistics
import subprocess
import sys
from multiprocessing import Pipe

import pytest
import torch
from conftest import GPT2, column
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from src.bench import training
from src.bench.machine import work
from src.bench.rivals import Rival
from src.benchmark import check
from src.cli.overrides import CONF, compose
from src.device import matrix_rate
from src.model.config import GPTConfig
from src.model.flops import flops_per_token, multiplying_parameters, peak_flops
from src.model.gpt import GPT
from src.runs.record import read_record
from src.training.module import PretrainingModule

SMALL = GPTConfig(context_length=1024, qkv_bias=True, tie_weights=True)


def test_operations_per_token():
    assert flops_per_token(SMALL, 1024) == 6 * 123_532_032 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"tie_weights": True}])
def test_the_weights_that_multiply_are_those_of_linear_layers(tiny, changes):
    net = GPT(tiny.changed(**changes))
    weights = sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Linear))
    assert multiplying_parameters(net.config) == weights


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA Z9000", None),
    ],
)
def test_unknown_hardware_has_no_peak_rather_than_a_wrong_one(name, peak):
    assert peak_flops(name) == peak


def test_training_logs_its_share_of_the_arithmetic(tiny_run):
    run = tiny_run("trainer.log_every_n_steps=2", "callbacks.text_samples.every_n_epochs=100")
    rates, shares = column(run, "perf/tokens_per_second"), column(run, "perf/mfu")
    assert len(rates) == len(shares) > 2
    peaks = [
        rate * flops_per_token(run.module.net.config, 16) / share for rate, share in zip(rates, shares, strict=True)
    ]
    assert peaks == pytest.approx([peaks[0]] * len(peaks), rel=1e-3)  # one peak for the whole run
    assert 1e8 < peaks[0] < 1e15


def test_a_run_that_stops_between_two_logs_has_a_speed(tiny_run, at_batch, tmp_path):
    def fail(module):
        raise RuntimeError("stopped")

    at_batch(7, fail)
    with pytest.raises(RuntimeError, match="stopped"):
        tiny_run("trainer.log_every_n_steps=50", folder=tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record["tokens_seen"] == 7 * 32
    assert record["tokens_per_second"] > 0


def test_a_rival_that_fails_is_told_by_its_name(capfd):
    with pytest.raises(ValueError, match="the machine ended with exit status 1"):
        Rival("the machine", work, "no such device", torch.float32)
    capfd.readouterr()


def test_a_measured_step_is_the_configs_optimizer_step(monkeypatch, long_text):
    """In the bare loop and in the Trainer: as many batches as make ``tokens_per_step``, and one update."""
    loss, update, calls = PretrainingModule.loss, torch.optim.AdamW.step, []

    def counted(self, *arguments, **options):
        calls.append("batch")
        return loss(self, *arguments, **options)

    def updated(self, *arguments, **options):
        done = update(self, *arguments, **options)
        calls.append("update")
        return done

    monkeypatch.setattr(PretrainingModule, "loss", counted)
    monkeypatch.setattr(torch.optim.AdamW, "step", updated)
    overrides = [
        *GPT2,
        f"data.path={long_text}",
        "measure=[training]",
        "trainer.accelerator=cpu",
    ]  # batches of 2 x 16 tokens
    config = check(compose("benchmark", [*overrides, "tokens_per_step=96"]))
    ours, theirs = Pipe()
    for request in ("bare", 2), ("trainer", 2), ("phases", 1), None:
        ours.send(request)
    training.work(theirs, config, lambda nodes, **options: [])
    assert ours.recv() == "ready"
    assert ours.recv() > 0 and ours.recv() > 0
    (phases,) = ours.recv()
    assert list(phases) == ["data", "forward", "backward", "optimizer"] and min(phases.values()) > 0
    assert calls[:20] == 5 * ["batch", "batch", "batch", "update"]


def test_the_matrix_rate_is_of_random_numbers_that_are_not_the_runs_own():
    state, factors = torch.get_rng_state(), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            factors.extend(args if func.name() == "aten::mm" else ())
            return func(*args, **kwargs or {})

    with Products():
        assert matrix_rate("cpu", torch.float32, 128) > 0
    assert factors and all(abs(factor.std().item() - 1) < 0.02 for factor in factors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_everything_at_once(tmp_path, text):
    output = tmp_path / "figures.json"
    overrides = ["model=gpt2_tiny", "rounds=2", "steps=2", "new_tokens=8", "peers=[transformers]"]
    overrides += ["trainer.accumulate_grad_batches=2"]
    overrides += ["measure=[training,generation,preparation]", f"source={text}", f"output={output}"]
    command = [sys.executable, "-m", "src.benchmark", *overrides, "trainer.accelerator=cpu"]
    run = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(output.read_text())
    trained, generation, preparation = (found[key] for key in ("training", "generation", "preparation"))
    assert set(trained["tokens_per_second"]) == {"bare loop", "Trainer", "transformers"}
    assert all(len(turns) == 2 and min(turns) > 0 for turns in trained["tokens_per_second"].values())
    flops = flops_per_token(GPTConfig(**found["config"]["model"]), 64)
    bare = statistics.median(trained["tokens_per_second"]["bare loop"])
    assert trained["mfu"] == pytest.approx(bare * flops / trained["matrix_flops"])
    assert set(trained["seconds_of_a_step"]) == {"data", "forward", "backward", "optimizer"}
    assert min(trained["peak_memory"].values()) > 1e8
    assert set(generation["share_of_read_rate"]) == {"float32", "bfloat16"}
    assert set(preparation["bytes_per_second"]) == {"this project", "tiktoken"}
    ratio = bare / statistics.median(trained["tokens_per_second"]["transformers"])
    assert f"we: {ratio:.2f} x" in run.stdout
    assert "training, steps of 2 micro-batches of 2 windows of 64 tokens" in run.stdout
    assert not (tmp_path / "outputs").exists()


BAD = {
    "measure=[speed]": "'measure=[\"training\"]'",
    "measure=[]": "'measure=[\"training\"]'",
    "peers=[nanogpt]": "'peers=[\"book\"]'",
    "rounds=0": "rounds=5",
    "tokens_per_step=1000": "use tokens_per_step=1024",
    "new_tokens=1000": "new_tokens=248",
    "measure=[preparation]": "source=<a txt",
    "source=nowhere.txt": "source=nowhere.txt does not exist",
    "output=LICENSE": "output=<a new file>",
    "output=LICENSE/b.json": "output=<a folder elsewhere>",
    "trainer.devices=2": "one process is measured; use trainer.devices=1",
    "trainer=ddp": "one process is measured; use trainer.devices=1",
    "weights=gpt2": "weights=gpt2 makes no difference to speed; leave it out",
    "peers_precision=fp8": "peers_precision=32-true",
}


@pytest.mark.parametrize("overrides", BAD)
def test_mistakes_are_one_line(command, overrides):
    status, _, err = command("benchmark", *overrides.split(" "))
    assert status == 1
    assert BAD[overrides] in err
    assert err.count("\n") <= 3 and "Traceback" not in err
