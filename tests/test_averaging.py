"""``callbacks=ema``: the averages are those of a plain loop, evaluations are of them, and training is what it was."""

import random
import signal

import pytest
import torch
from conftest import column
from interrupting import first_difference
from test_distributed import SAME, losses
from test_evaluation import evaluated, split_loss

from src import evaluate
from src.checkpoint.find import read_checkpoint
from src.checkpoint.interruption import Interrupted
from src.cli import overrides as cli
from src.generation.config import GenerationConfig
from src.generation.text import continue_texts
from src.interop.weights import load_weights
from src.train import check
from src.training.module import PretrainingModule

EMA = ("callbacks=ema", "callbacks.ema.decay=0.5", "~callbacks.text_samples", "~callbacks.loss_plot",
       "schedule=constant", "optimizer.learning_rate=3e-3", "data.batch_size=4")  # fmt: skip


@pytest.fixture
def each_step(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The weights before the first step, then after each."""
    found = []
    step = PretrainingModule.optimizer_step

    def recorded(self, *args, **kwargs):
        if not found:
            found.append({name: weight.clone() for name, weight in self.state_dict().items()})
        step(self, *args, **kwargs)
        found.append({name: weight.clone() for name, weight in self.state_dict().items()})

    monkeypatch.setattr(PretrainingModule, "optimizer_step", recorded)
    return found


def last(run) -> dict:
    return read_checkpoint(run.folder / "checkpoints" / "last.ckpt")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("accumulate", [1, 5])  # 12 batches: two steps of 5, and what is left over
@pytest.mark.parametrize("tie_weights", ["true", "false"])
def test_averages_equal_a_plain_loop(tiny_run, each_step, accumulate, tie_weights):
    run = tiny_run(*EMA, f"trainer.accumulate_grad_batches={accumulate}", f"model.tie_weights={tie_weights}",
                   f"trainer.max_epochs={accumulate}", "eval.every_steps=3")  # fmt: skip
    averages = {name: weight.clone() for name, weight in each_step[0].items()}
    for n, weights in enumerate(each_step[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        for name, average in averages.items():
            average.lerp_(weights[name], 1 - decay)
    saved = last(run)
    assert saved["averaging"]["updates"] == run.record["optimizer_steps"] == len(each_step) - 1 >= 10
    assert same(saved["averaging"]["state_dict"], averages)
    assert same(saved["state_dict"], each_step[-1])
    assert same(run.module.state_dict(), each_step[-1])
    assert not same(averages, each_step[-1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_what_it_was(tiny_run, precision):
    common = (*EMA, "trainer.max_epochs=2", "eval.every_steps=5", f"trainer.precision={precision}")
    one, other = tiny_run(*common), tiny_run(*common, "~callbacks.ema")
    assert column(one, "train/loss") == column(other, "train/loss")
    assert column(one, "val/loss")[1:] != column(other, "val/loss")[1:]
    assert same(last(one)["state_dict"], last(other)["state_dict"])
    one, other = (last(run)["optimizer_states"][0]["state"] for run in (one, other))
    assert all(one[at]["exp_avg_sq"].equal(other[at]["exp_avg_sq"]) for at in one)


def test_weights_of_16_bits_are_averaged_in_32(tiny_run):
    run = tiny_run(*EMA, "trainer.precision=bf16-true", "callbacks.ema.decay=0.999", "trainer.max_steps=4")
    assert {weight.dtype for weight in last(run)["state_dict"].values()} == {torch.bfloat16}
    assert {average.dtype for average in last(run)["averaging"]["state_dict"].values()} == {torch.float32}


@pytest.mark.parametrize("where", ["between evaluations", "in an evaluation", "at the end"])
def test_resumed_to_the_same_bits(tiny_run, at_batch, monkeypatch, tmp_path, where):
    common = (*EMA, "trainer.max_epochs=2", "eval.every_steps=4", "trainer.accumulate_grad_batches=2")
    whole = tiny_run(*common, "callbacks=ema")
    stop = {"between evaluations": random.Random(0).randrange(23), "at the end": 23, "in an evaluation": 15}[where]
    validation_step, told = PretrainingModule.validation_step, []

    def then_stop(self, *args, **kwargs):
        if self.trainer.global_step == 8 and where == "in an evaluation" and not told:
            told.append(signal.raise_signal(signal.SIGTERM))
        return validation_step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingModule, "validation_step", then_stop)
    if where != "in an evaluation":
        at_batch(stop, lambda module: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tiny_run(*common, folder=tmp_path / "cut")
    assert last(whole)["global_step"] == 12
    tiny_run(*common, resume=tmp_path / "cut")
    assert first_difference(whole.folder, tmp_path / "cut") is None


def test_extended_and_continued_elsewhere_to_the_same_bits(tiny_run):
    whole, short = tiny_run(*EMA, "trainer.max_epochs=2"), tiny_run(*EMA)
    path = short.folder / "checkpoints" / "last.ckpt"
    elsewhere = tiny_run(*EMA, "trainer.max_epochs=2", f"ckpt_path={path}")
    extended = tiny_run(*EMA, "trainer.max_epochs=2", resume=short.folder)
    for run in elsewhere, extended:
        assert same(last(run)["state_dict"], last(whole)["state_dict"])
        assert same(last(run)["averaging"]["state_dict"], last(whole)["averaging"]["state_dict"])
        assert last(run)["averaging"]["updates"] == 24


def test_averages_begin_and_end_with_the_callback(tiny_run, each_step):
    plain = tiny_run(*EMA, "~callbacks.ema", "trainer.max_steps=5")
    path = plain.folder / "checkpoints" / "last.ckpt"
    assert "averaging" not in last(plain)
    run = tiny_run(*EMA, "trainer.max_steps=6", f"ckpt_path={path}")
    first = {name: weight.lerp(each_step[-1][name], 1 - 2 / 11) for name, weight in last(plain)["state_dict"].items()}
    assert same(last(run)["averaging"]["state_dict"], first)
    path = run.folder / "checkpoints" / "last.ckpt"
    assert "averaging" not in last(tiny_run(*EMA, "~callbacks.ema", "trainer.max_steps=7", f"ckpt_path={path}"))


@pytest.mark.parametrize(
    "cadence", ["eval.every_steps=5", "+trainer.val_check_interval=1000"]
)  # the end comes after fit
def test_evaluations_are_of_the_averages(tiny_run, text, tmp_path, cadence, caplog):
    caplog.set_level("INFO")
    run = tiny_run(*EMA, cadence, "data.stride=11")
    path = run.folder / "checkpoints" / "last.ckpt"
    net = load_weights(path)
    assert f"using the averaged weights in {path}" in caplog.text
    for split, recorded in ("val", run.record["val_loss"]), ("train", run.record["train_loss"]):
        assert recorded == pytest.approx(split_loss(net, evaluated(run, split)), abs=1e-5)
    own = split_loss(run.module.net, evaluated(run, "val"))
    assert abs(run.record["val_loss"] - own) > 1e-3
    loaded = PretrainingModule.load_from_checkpoint(path)
    assert same(loaded.state_dict(), last(run)["state_dict"])
    cfg = cli.compose("evaluate", [f"weights={run.folder}", f"data.path={text}", "surprises=0"])
    best = min(column(run, "val/loss"))
    assert evaluate.evaluate(cfg, tmp_path)["loss"] == pytest.approx(best, abs=1e-6)


def test_samples_are_of_the_averages(tiny_run):
    run = tiny_run(*EMA[:2], *EMA[3:], "callbacks.text_samples.max_new_tokens=12", "optimizer.learning_rate=0.1",
                   "trainer.max_steps=5")  # fmt: skip
    path = run.folder / "checkpoints" / "last.ckpt"
    greedy = GenerationConfig(temperature=0, max_new_tokens=12)
    nets = load_weights(path), run.module.net.eval()
    byte = run.datamodule.tokenizer
    averaged, own = (continue_texts(net, ["Every effort moves you"], greedy, (), byte)[0][0].text for net in nets)
    entry = (run.folder / "samples.md").read_text().split("## step 5")[1]
    assert averaged.replace("\n", "\n> ") in entry
    assert own.replace("\n", "\n> ") not in entry


@pytest.mark.parametrize("end", ["error", "signal"])
def test_whatever_happens_in_an_evaluation(tiny_run, monkeypatch, each_step, tmp_path, end):
    """A checkpoint saved within it, and the module after an exception, have the weights themselves."""
    modules = []
    validation_step = PretrainingModule.validation_step

    def disturbed(self, *args, **kwargs):
        if self.trainer.global_step == 5 and not modules:
            modules.append(self)
            assert not same(self.state_dict(), each_step[-1])
            self.trainer.save_checkpoint(tmp_path / "within.ckpt")
            if end == "error":
                raise RuntimeError("out of luck")
            signal.raise_signal(signal.SIGTERM)
        return validation_step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingModule, "validation_step", disturbed)
    with pytest.raises((RuntimeError, Interrupted)):
        tiny_run(*EMA, "eval.every_steps=5", folder=tmp_path / "run")
    assert same(read_checkpoint(tmp_path / "within.ckpt")["state_dict"], each_step[5])
    assert same(modules[0].state_dict(), each_step[-1])
    if end == "signal":
        assert same(read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"], each_step[5])


def test_what_cannot_be_averaged_is_told_at_once(tiny_run):
    problems = cli.find_problems("train", ["callbacks=ema", "trainer=fsdp", "trainer.devices=1"], check)
    assert problems == ["callbacks=ema does not average sharded weights; use trainer=ddp, or ~callbacks.ema"]
    with pytest.raises(
        Exception, match=r"callbacks\.ema\.decay=1 must be below 1\.0; use callbacks\.ema\.decay=0\.999"
    ):
        tiny_run("callbacks=ema", "callbacks.ema.decay=1")


@pytest.mark.slow
def test_two_processes_average_what_one_does(ranks, tmp_path, tiny_run):
    whole = tiny_run(*SAME, *EMA, "trainer.max_steps=6")
    ddp = ranks(*SAME, *EMA, "data.batch_size=2", "trainer.max_steps=6", f"hydra.run.dir={tmp_path / 'ddp'}")
    _, err = ddp.communicate()
    assert ddp.returncode == 0, err
    assert losses(tmp_path / "ddp", "val/loss") == pytest.approx(column(whole, "val/loss"), abs=2e-5)
    found = read_checkpoint(tmp_path / "ddp" / "checkpoints" / "last.ckpt")["averaging"]["state_dict"]
    for name, average in last(whole)["averaging"]["state_dict"].items():
        torch.testing.assert_close(found[name], average, atol=1e-4, rtol=0)
