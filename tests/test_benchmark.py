"""What is measured is what is said to be measured."""

import json
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import column
from torch import nn

from src.bench.machine import work
from src.bench.rivals import Rival
from src.cli.overrides import CONF
from src.model.config import GPTConfig
from src.model.flops import flops_per_token, multiplying_parameters, peak_flops
from src.model.gpt import GPT

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


def test_a_rival_that_fails_is_told_by_its_name(capfd):
    with pytest.raises(ValueError, match="the machine ended with exit status 1"):
        Rival("the machine", work, "no such device", torch.float32)
    capfd.readouterr()


@pytest.mark.slow
def test_everything_at_once(tmp_path, text):
    output = tmp_path / "figures.json"
    overrides = ["model=gpt2_tiny", "rounds=2", "steps=2", "new_tokens=8", "peers=[transformers]"]
    overrides += ["measure=[training,generation,preparation]", f"source={text}", f"output={output}"]
    command = [sys.executable, "-m", "src.benchmark", *overrides, "trainer.accelerator=cpu"]
    run = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(output.read_text())
    training, generation, preparation = (found[key] for key in ("training", "generation", "preparation"))
    assert set(training["tokens_per_second"]) == {"bare loop", "Trainer", "transformers"}
    assert all(len(turns) == 2 and min(turns) > 0 for turns in training["tokens_per_second"].values())
    flops = flops_per_token(GPTConfig(**found["config"]["model"]), 64)
    bare = statistics.median(training["tokens_per_second"]["bare loop"])
    assert training["mfu"] == pytest.approx(bare * flops / training["matrix_flops"])
    assert set(training["seconds_of_a_step"]) == {"data", "forward", "backward", "optimizer"}
    assert min(training["peak_memory"].values()) > 1e8
    assert set(generation["share_of_read_rate"]) == {"float32", "bfloat16"}
    assert set(preparation["bytes_per_second"]) == {"this project", "tiktoken"}
    ratio = bare / statistics.median(training["tokens_per_second"]["transformers"])
    assert f"we: {ratio:.2f} x" in run.stdout
    assert not (tmp_path / "outputs").exists()


BAD = {
    "measure=[speed]": "'measure=[\"training\"]'",
    "measure=[]": "'measure=[\"training\"]'",
    "peers=[nanogpt]": "'peers=[\"book\"]'",
    "rounds=0": "rounds=5",
    "new_tokens=1000": "new_tokens=248",
    "measure=[preparation]": "source=<a txt",
    "source=nowhere.txt": "source=nowhere.txt does not exist",
    "output=LICENSE": "output=<a new file>",
    "weights=gpt2": "weights=gpt2 makes no difference to speed; leave it out",
    "peers_precision=fp8": "peers_precision=32-true",
}


@pytest.mark.parametrize("overrides", BAD)
def test_mistakes_are_one_line(command, overrides):
    status, _, err = command("benchmark", *overrides.split(" "))
    assert status == 1
    assert BAD[overrides] in err
    assert err.count("\n") <= 3 and "Traceback" not in err
