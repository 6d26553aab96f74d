"""A loss or a gradient that is no number never reaches the weights."""

import json
import math

import pytest
import torch
from conftest import FAST, column
from test_kernels import Calls
from torch._subclasses.fake_tensor import FakeTensorMode

from src.checkpoint.find import read_checkpoint
from src.training.finite_guard import FiniteGuard, NonFiniteError
from src.training.module import PretrainingModule

COMMON = ("callbacks=none", "data.batch_size=4", "checkpoint.every_steps=2", "eval.every_steps=5")


def through_gradient(value):
    def act(module):
        parameter = list(module.parameters())[5]
        handle = parameter.register_hook(lambda gradient: (handle.remove(), torch.full_like(gradient, value))[1])

    return act


def through_weight(value, name="head.weight"):
    def act(module):
        module.net.get_parameter(name).data.flatten()[3] = value

    return act


def through_loss(value):
    def act(module):
        norm = module.net.final_norm
        handle = norm.register_forward_hook(lambda norm, inputs, hidden: (handle.remove(), hidden * value)[1])

    return act


PLACES = {
    "loss nan": through_loss(math.nan),
    "loss inf": through_loss(math.inf),
    "loss -inf": through_loss(-math.inf),
    "gradient nan": through_gradient(math.nan),
    "gradient inf": through_gradient(math.inf),
    "gradient -inf": through_gradient(-math.inf),
    "weight nan": through_weight(math.nan),
    "weight inf": through_weight(math.inf),
    "norm nan": through_weight(math.nan, "final_norm.weight"),
    "position inf": through_weight(math.inf, "pos_emb.weight"),
}


def test_a_step_reads_its_numbers_from_the_device_at_once(tiny_run, monkeypatch):
    check, seen = FiniteGuard.on_before_optimizer_step, set()

    def watched(self, *arguments):
        with Calls() as calls:
            check(self, *arguments)
        seen.update(calls.names)

    monkeypatch.setattr(FiniteGuard, "on_before_optimizer_step", watched)
    tiny_run("trainer.max_steps=2", "trainer.gradient_clip_val=0.01", *FAST)
    assert "aten::_foreach_mul_.Tensor" in seen  # clipped
    assert "aten::_local_scalar_dense" not in seen  # the value of a single tensor


def test_numbers_are_logged_without_copying_them_to_the_device(tiny, monkeypatch):
    module, logged = PretrainingModule(tiny), {}
    monkeypatch.setattr(PretrainingModule, "device", torch.device("cuda"))
    monkeypatch.setattr(module, "log_dict", logged.update)
    with FakeTensorMode(), Calls() as calls:
        module.log_exactly(step=3, lr=6e-4)
    assert calls.names == {"aten::full"}
    assert {(value.device.type, value.dtype) for value in logged.values()} == {("cuda", torch.float64)}


@pytest.mark.parametrize("place", PLACES)
def test_stopped_before_the_update(tiny_run, at_batch, tmp_path, place, trials):
    folder = tmp_path / "run"
    seen = {}

    def act(module):
        PLACES[place](module)
        seen["weights"] = {name: value.clone() for name, value in module.net.state_dict().items()}
        seen["module"] = module

    at_batch(6, act)
    with pytest.raises(
        NonFiniteError, match=r"step 7 was not made: .* in .*non_finite\.json; use optimizer\.learning_rate="
    ):
        tiny_run(*COMMON, folder=folder)
    for name, value in seen["module"].net.state_dict().items():
        assert torch.equal(value.nan_to_num(7), seen["weights"][name].nan_to_num(7))
    files = sorted(folder.glob("checkpoints/*"))
    assert [file.name for file in files] == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    for file in files:
        assert all(value.isfinite().all() for value in read_checkpoint(file)["state_dict"].values())
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 6
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["optimizer_steps"] == 6
    trials.passed("infinity or NaN in loss, gradient or weight", 1, "stopped before the update, no such checkpoint")


def test_report_names_the_text(tiny_run, at_batch, tmp_path):
    at_batch(16, through_loss(math.nan))  # the second epoch's fifth batch, the second of its step
    with pytest.raises(NonFiniteError, match="step 9 was not made"):
        tiny_run(*COMMON, "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2", folder=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert report["step"] == 9
    assert 0 < report["lr"] < 6e-4
    assert report["grad_norm"] == "nan"  # JSON has no NaN
    assert [batch["batch"] for batch in report["batches"]] == [16, 17]
    assert [math.isnan(float(batch["loss"])) for batch in report["batches"]] == [True, False]
    from src.data.config import TokenizerConfig
    from src.data.datamodule import TextDataModule
    from src.tokenizer import token_ids_to_text

    data = TextDataModule(context_length=16, batch_size=4, path=str(tmp_path / "text.txt"),
                          tokenizer=TokenizerConfig(name="byte"))  # fmt: skip
    data.setup()
    for window in (window for batch in report["batches"] for window in batch["windows"]):
        tokens = data.train_windows.tokens[window["offset"] : window["offset"] + 16]
        assert window["tokens"] == tokens.tolist()
        assert window["text"] == token_ids_to_text(torch.tensor(window["tokens"]), data.tokenizer)


def test_continued_without_the_text(tiny_run, at_batch, tmp_path):
    at_batch(6, through_loss(math.nan))
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"resume=.*run 'skip_batches=\[6\]'"):
        tiny_run(*COMMON, folder=folder)
    run = tiny_run(*COMMON, "skip_batches=[6]", resume=folder)
    assert run.record["status"] == "completed"
    assert run.record["optimizer_steps"] == 12
    assert run.record["tokens_seen"] == 11 * 64
    assert column(run, "step") == list(range(13))
    assert len(column(run, "train/loss")) == 11  # step 7 had nothing to train on
    assert all(map(math.isfinite, column(run, "train/loss")))
    again = tiny_run(*COMMON, "trainer.max_epochs=2", "schedule.on_resume=keep", resume=run.folder)
    assert again.module.skip_batches == {6}
    assert read_checkpoint(run.folder / "checkpoints" / "last.ckpt")["skipped_batches"] == [6]


def test_a_step_of_skipped_batches_changes_nothing(tiny_run, tmp_path):
    one, two = (
        tiny_run(*COMMON, "skip_batches=[3]", f"trainer.max_steps={steps}", "schedule=constant") for steps in (3, 4)
    )
    weights = [run.module.net.state_dict() for run in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
