"""What is measured: losses, perplexity and bits per byte of a whole split, at the steps that were asked for."""

import math

import pytest
import torch
from conftest import column, metrics_of, story_of
from torch.nn import functional as F
from torch.utils.data import Subset

from src.model.gpt import GPT
from src.tokenizer import token_byte_counts

ONE_STEP = ("trainer.max_steps=1", "callbacks.text_samples.max_new_tokens=1")


def evaluated(run, key: str) -> Subset:
    """The windows of a split that every evaluation of ``run`` is to score: all that validate, and as many that train,
    at equal distances."""
    val, train = run.datamodule.val_windows, run.datamodule.train_windows
    windows = val if key == "val" else train
    count = min(len(val), len(windows))
    return Subset(windows, [at * len(windows) // count for at in range(count)])


def split_loss(net: GPT, windows) -> float:
    """Sum of the losses of all targets over their number, one window at a time."""
    net.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(net(x[None])[0], y, reduction="sum").item() for x, y in windows]
    return sum(losses) / sum(len(y) for _, y in windows)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_first_row_is_the_untrained_model_whatever_the_batch_size(tiny_run, text, batch_size):
    text.write_text(story_of(5000))
    run = tiny_run(*ONE_STEP, f"data.batch_size={batch_size}", "data.stride=11")
    first = metrics_of(run)[0]
    torch.manual_seed(123)
    net = GPT(run.module.net.config)
    expected = {key: split_loss(net, evaluated(run, key)) for key in ("val", "train")}
    assert first["step"] == first["tokens_seen"] == 0
    assert first["val/loss"] == pytest.approx(expected["val"], abs=1e-5)
    assert first["train/eval_loss"] == pytest.approx(expected["train"], abs=1e-5)
    assert first["val/perplexity"] == pytest.approx(math.exp(expected["val"]), rel=1e-5)
    assert first["train/perplexity"] == pytest.approx(math.exp(expected["train"]), rel=1e-5)
    windows = run.datamodule.val_windows
    targets = torch.cat([y for _, y in windows])
    size = int(token_byte_counts()[targets.numpy()].sum())
    bits = expected["val"] * len(targets) / math.log(2) / size
    assert first["val/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_evaluates_by_optimizer_step_and_after_the_last(tiny_run, accumulate):
    run = tiny_run(
        "callbacks=none",
        "eval.every_steps=4",
        "trainer.max_epochs=null",
        "trainer.max_steps=10",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    assert [row["step"] for row in metrics_of(run) if "val/loss" in row] == [0, 4, 8, 10]


def test_final_figures_are_those_of_the_final_weights(tiny_run):
    run = tiny_run("callbacks=none", "trainer.max_steps=3")
    for key, recorded in ("val", run.record["val_loss"]), ("train", run.record["train_loss"]):
        assert recorded == pytest.approx(split_loss(run.module.net, evaluated(run, key)), abs=1e-5)
    assert run.record["val_perplexity"] == pytest.approx(math.exp(run.record["val_loss"]))
    assert column(run, "val/loss")[-1] == run.record["val_loss"]


def test_evaluation_over_some_batches(tiny_run):
    run = tiny_run("callbacks=none", "eval.batches=2", "trainer.max_steps=1", "data.batch_size=1")
    _, train = run.datamodule.val_dataloader()
    net = run.module.net.eval()
    expected = sum(F.cross_entropy(net(x)[0], y[0]).item() for x, y in train) / 2
    assert run.record["train_loss"] == pytest.approx(expected, abs=1e-5)


def test_lightnings_own_interval_still_works(tiny_run):
    run = tiny_run("callbacks=none", "+trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4", "data.batch_size=8")
    per_epoch = len(run.datamodule.train_dataloader())
    assert [row["step"] for row in metrics_of(run) if "val/loss" in row] == [0, 2 * per_epoch, 4 * per_epoch]


def test_lightnings_share_of_an_epoch(tiny_run):
    run = tiny_run("callbacks=none", "+trainer.val_check_interval=0.5", "data.batch_size=4")  # 12 batches
    assert [row["step"] for row in metrics_of(run) if "val/loss" in row] == [0, 6, 12]


def test_without_evaluation(tiny_run):
    run = tiny_run("trainer.limit_val_batches=0", "trainer.max_steps=2", "callbacks.text_samples.max_new_tokens=1")
    assert run.record["val_loss"] is None
    assert column(run, "val/loss") == []
    assert (run.folder / "checkpoints" / "last.ckpt").exists()
