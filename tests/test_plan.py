"""Before the model is allocated, a run says what memory, disk and time it takes, and refuses what cannot fit."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from test_run import started

from src.cli.overrides import compose
from src.cli.typed import typed
from src.model.architectures import count_parameters
from src.runs import batch_size, plan
from src.runs.batch_size import with_batches
from src.training import step_cost
from src.training.config import TrainConfig
from src.training.step_cost import estimate_memory

LONG = ("model.context_length=10000000", "data.context_length=16")  # 4 TB of positions at 100,000 dimensions


def config_of(*overrides: str) -> TrainConfig:
    return typed(compose("train", [*TINY, *overrides]), TrainConfig).with_window().with_vocabulary(50257)


@pytest.mark.parametrize("overrides", [(), ("model.tie_weights=true",), ("model.n_layers=5",), ("optimizer=muon",)])
def test_weights_gradients_and_optimizer_are_forecast_exactly(overrides):
    config = config_of(*overrides)
    memory, size = estimate_memory(config, "cpu", "32-true"), 4 * count_parameters(config.model)
    assert memory.weights == memory.gradients == size
    if config.optimizer.name == "adamw":
        assert 2 * size <= memory.optimizer < 2 * size + 1000  # and the numbers of steps
    else:
        assert size < memory.optimizer < 2 * size
    assert memory.peak > memory.weights + memory.optimizer


def test_what_saves_memory_saves_memory_in_the_forecast():
    deep = ("model.n_layers=6", "model.context_length=64", "data.batch_size=8", "model.vocab_size=50257")
    full = estimate_memory(config_of(*deep), "cpu", "32-true")
    assert estimate_memory(config_of(*deep, "activation_checkpointing=true"), "cpu", "32-true").peak < full.peak
    assert estimate_memory(config_of(*deep), "cpu", "bf16-mixed").activations < 0.8 * full.activations
    assert estimate_memory(config_of(*deep), "cpu", "bf16-true").weights == full.weights / 2
    assert estimate_memory(config_of(*deep, "kernels=plain"), "cpu", "32-true").peak > full.peak


def test_accumulated_gradients_are_alive_in_the_next_forward_pass():
    shape = ("data.batch_size=16", "model.context_length=64")
    one = estimate_memory(config_of(*shape), "cpu", "32-true")
    several = estimate_memory(config_of(*shape, "trainer.accumulate_grad_batches=2"), "cpu", "32-true")
    assert several[:-1] == one[:-1]
    assert several.peak > one.peak + one.gradients / 2


def test_a_model_that_does_not_fit_is_refused_before_it_is_allocated(tiny_run, tmp_path, long_text, monkeypatch):
    needed = r"out of memory: a training step needs [\d.e+]+ GB, [\d.]+ GB are free; "
    with pytest.raises(ValueError, match=needed + "use a smaller model, or trainer=fsdp on several GPUs"):
        tiny_run("model.emb_dim=100000", "model.n_layers=100", "model.n_heads=100")
    monkeypatch.setattr(plan, "free_on", lambda device: 55_000_000)  # weights, gradients and optimizer take 52 MB
    with pytest.raises(ValueError, match=needed + "use data.batch_size=8 trainer.accumulate_grad_batches=2 for less"):
        tiny_run("data.batch_size=16", "tokenizer=gpt2", f"data.path={long_text}")
    assert not list(tmp_path.glob("run*/*"))


@pytest.mark.slow
def test_measured_steps_agree_with_the_forecast(tmp_path):
    done = started(tmp_path, "dry_run=measure", "data.batch_size=16", "trainer.precision=32-true").stdout
    (forecast,) = re.findall(r"memory +about ([\d.]+) GB at the peak", done)
    (measured,) = re.findall(r"per optimizer step, ([\d.]+) GB at the peak", done)
    assert float(forecast) == pytest.approx(float(measured), rel=0.25)
    assert "by the measured steps" in done
    assert list(tmp_path.iterdir()) == []


def test_the_time_is_that_of_the_last_run_of_the_same_shape(tiny_run, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    tiny_run("trainer.max_steps=3", folder=tmp_path / "outputs" / "gpt2" / "first")
    assert "time        not known; dry_run=measure measures it" in caplog.text
    tiny_run("dry_run=true", "optimizer.learning_rate=1e-3")
    assert re.search(r"time +about 0:00:\d\d at the [\d,]+ tokens/s of outputs/gpt2/first", caplog.text)
    caplog.clear()
    tiny_run("dry_run=true", "data.batch_size=3")
    assert "tokens/s of" not in caplog.text


def test_tokens_per_parameter_is_the_length(tiny_run):
    run = tiny_run("tokens_per_parameter=0.001", "trainer.max_epochs=null", "tokenizer=byte")
    parameters = run.record["parameters"]
    assert run.record["optimizer_steps"] == round(0.001 * parameters / 32) > 0
    with pytest.raises(ValueError, match=r"tokens_per_parameter=1 is the length of the run; use trainer.max_steps=-1"):
        tiny_run("tokens_per_parameter=1")
    with pytest.raises(ValueError, match=r"which is not known before the text is read; use model.vocab_size"):
        tiny_run("tokens_per_parameter=1", "trainer.max_epochs=null", "tokenizer=char")


def test_the_largest_batch_that_fits_divides_the_step(monkeypatch, tiny_run):
    asked = config_of("data.batch_size=auto", "tokens_per_step=192")  # 12 windows
    assert with_batches(asked, 1).data.batch_size == 12
    tried = []
    monkeypatch.setattr(batch_size, "_fits", lambda config, *_: tried.append(config.data.batch_size) or len(tried) == 3)
    assert with_batches(asked, 1).data.batch_size == 4
    assert tried == [12, 6, 4]
    monkeypatch.setattr(batch_size, "free_on", lambda device: 0)
    with pytest.raises(MemoryError):
        with_batches(asked, 1)
    with pytest.raises(ValueError, match=r"data.batch_size=auto needs the tokens of a step; use tokens_per_step=<n>"):
        config_of("data.batch_size=auto")


def test_a_batch_that_does_not_fit_is_found_out_in_another_process():
    assert not batch_size._fits(config_of("model.emb_dim=100000", *LONG), torch.device("cpu"), "32-true")


def test_what_fits_has_made_a_step_with_the_state_of_the_optimizer(monkeypatch):
    acts = []
    monkeypatch.setattr(step_cost, "seconds_of", lambda act, _: acts.append(act.__name__) or act() or 0.0)
    step_cost.measure_step(config_of(*LONG), torch.device("cpu"), "32-true", seconds=0)
    assert acts == ["batch", "update", "evaluation"] * 2


def test_a_resumed_run_keeps_the_batch_that_it_found(tiny_run, monkeypatch):
    overrides = ("data.batch_size=auto", "tokens_per_step=64", "trainer.max_epochs=2")
    monkeypatch.setattr(batch_size, "_fits", lambda config, *_: config.data.batch_size <= 2)
    first = tiny_run(*overrides, "trainer.max_steps=3")
    assert first.record["config"]["data"]["batch_size"] == 2
    monkeypatch.setattr(batch_size, "_fits", lambda config, *_: True)
    again = tiny_run(*overrides, "trainer.max_steps=5", "schedule=constant", resume=first.folder)
    assert again.record["config"]["data"]["batch_size"] == 2
    assert again.record["optimizer_steps"] == 5


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.limit_val_batches=0", "evaluation  none"),
        ("+trainer.check_val_every_n_epoch=2", "evaluation  by trainer.check_val_every_n_epoch=2, of all"),
        ("eval.every_steps=3", "evaluation  every 3 steps, of all"),
    ],
)
def test_the_card_says_when_a_run_evaluates(tiny_run, caplog, override, line):
    caplog.set_level("INFO")
    tiny_run("dry_run=true", override)
    assert line in caplog.text


def test_a_resumed_run_has_the_evaluations_of_its_rest():
    """Of 1,000 steps with 25 evaluations 900 are done: 3 remain, one of them at the end, and that of the start."""
    data = SimpleNamespace(steps_per_epoch=10, evaluated_windows=lambda: ([0], []), windows_per_batch=1)
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    times = step_cost.StepTimes(batch=0, update=0, evaluation=60)
    line = plan._time_line(config_of(), trainer, data, 1000, 900, times)
    assert line == "about 0:04:00 by the measured steps"
