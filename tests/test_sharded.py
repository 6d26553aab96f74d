"""A model sharded over two ranks trains what one process does; its checkpoints are one file or parts."""

import os
import shutil
import signal

import pytest
import torch
from conftest import column, metrics_of
from test_distributed import SAME, losses, wait_for_step

from src.checkpoint.find import newest_good_checkpoint, read_checkpoint
from src.checkpoint.parts import OPTIMIZER, WEIGHTS, read_file_or_parts
from src.checkpoint.seal import DamagedError
from src.cli import overrides as cli
from src.interop.weights import read_weights
from src.model.architectures import ARCHITECTURES
from src.model.gpt import GPT
from src.runs.record import read_record
from src.train import check
from src.training.trainer import build_module

FSDP = (*SAME, "trainer=fsdp")
PARTS = (*FSDP, "data.batch_size=2", "checkpoint.in_parts=true", "checkpoint.every_steps=3")
BOTH = (WEIGHTS, OPTIMIZER)
WATCH = """
import torch
from lightning.pytorch import Callback

class Watch(Callback):
    def on_train_start(self, trainer, pl_module):
        self.seen = set()
        linear = pl_module.net.blocks[0].ff.up_proj
        linear.register_forward_pre_hook(lambda module, inputs: self.seen.add(module.weight.dtype))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        reduced = [parameter for parameter in pl_module.parameters() if parameter.grad is not None]
        assert not reduced, "between the batches of a step no gradient has been reduced over the ranks"
        assert {parameter.dtype for parameter in pl_module.parameters()} == {torch.float32}

    def on_train_end(self, trainer, pl_module):
        assert self.seen == {torch.bfloat16}, self.seen
"""


def tensors_in(content) -> dict[str, torch.Tensor]:
    (optimizer,) = content[OPTIMIZER]
    moments = {f"{number} {name}": one for number, state in optimizer["state"].items() for name, one in state.items()}
    return content[WEIGHTS] | moments


@pytest.mark.slow
def test_in_bfloat16_and_compiled(ranks, tmp_path, tiny_run):
    """Blocks are gathered in bfloat16 and gradients reduced once per step; compiled blocks compute the same."""
    (tmp_path / "watch.py").write_text(WATCH)
    common = ("trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed")
    alone = column(tiny_run(*SAME, *common, "data.batch_size=4", "callbacks=none"), "train/loss")
    for name, more in ("eager", "+callbacks.watch._target_=watch.Watch"), ("compiled", "compile=true"):
        process = ranks(*FSDP, *common, "data.batch_size=2", more, f"hydra.run.dir={tmp_path / name}")
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        assert losses(tmp_path / name) == pytest.approx(alone, abs=5e-3)
    assert losses(tmp_path / "compiled") != losses(tmp_path / "eager")  # it was compiled, and rounds elsewhere


@pytest.mark.slow
def test_parts_are_the_checkpoint_of_one_process(ranks, tmp_path, tiny_run):
    """Two ranks write parts, which one process and two ranks continue; two continue the file of one process."""
    common = (*SAME, "data.batch_size=4", "callbacks=none")
    half, whole = tiny_run(*common, "trainer.max_steps=8"), tiny_run(*common, "trainer.max_steps=16")
    expected = column(whole, "train/loss")
    parts = tmp_path / "parts"
    process = ranks(*PARTS, "trainer.max_steps=8", f"hydra.run.dir={parts}")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("text samples and tasks, which need the whole model, are left out") == 1
    assert losses(parts) == pytest.approx(expected[:8], abs=2e-5)
    assert losses(parts, "val/loss")[0] == pytest.approx(metrics_of(whole)[0]["val/loss"], abs=1e-6)  # the same draws

    last = parts / "checkpoints" / "last.ckpt"
    content = read_file_or_parts(last, "ckpt_path", kinds=BOTH)
    file = half.folder / "checkpoints" / "last.ckpt"
    single = read_checkpoint(file)
    assert single["global_step"] == content["global_step"] == 8
    ours, theirs = tensors_in(content), tensors_in(single)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3, msg=name)
    assert single["optimizer_states"][0]["param_groups"] == content["optimizer_states"][0]["param_groups"]

    one = tiny_run(*SAME, "data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.max_steps=16",
                   "callbacks=none", f"ckpt_path={last}")  # fmt: skip
    assert column(one, "train/loss") == pytest.approx(expected[8:], abs=5e-5)
    for name, start in {"two": last, "file": file}.items():
        process = ranks(*PARTS, "trainer.max_steps=16", f"ckpt_path={start}", f"hydra.run.dir={tmp_path / name}")
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert losses(tmp_path / name) == pytest.approx(expected[8:], abs=5e-5)
        assert (tmp_path / name / "checkpoints" / "last.ckpt").is_dir()

    config, weights = read_weights(last)
    assert weights.keys() == {name.removeprefix("net.") for name in content[WEIGHTS]}
    assert all(tensor.equal(content[WEIGHTS][f"net.{name}"]) for name, tensor in weights.items())
    assert config == whole.module.net.config
    assert read_weights(parts)[1].keys() == weights.keys()  # best.ckpt, a second name of the same files
    best = parts / "checkpoints" / "best.ckpt"
    assert all(file.samefile(last / file.name) for file in best.iterdir())


@pytest.mark.slow
def test_interrupted_and_damaged(ranks, tmp_path):
    """SIGTERM waits for the parts; a flipped bit, a missing and a foreign file are noticed, and older parts used."""
    common = (*PARTS, "model.drop_rate=0.1", "trainer.max_steps=30")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stopped = ranks(*common, f"hydra.run.dir={cut}")
    wait_for_step(stopped, cut, 7)
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate()
    assert stopped.returncode == 143, err
    checkpoints = cut / "checkpoints"
    saved = read_checkpoint(checkpoints / "last.ckpt")["global_step"]
    assert saved == read_record(cut)["optimizer_steps"] >= 7
    assert not list(checkpoints.glob("*.part"))

    harms = {"flipped": flip, "missing": os.remove, "foreign": lambda file: shutil.copy(file, f"{file}.safetensors")}
    for name, harm in harms.items():
        copy = tmp_path / name
        shutil.copytree(checkpoints, copy)
        shutil.rmtree(copy / "best.ckpt")  # of the same step as last.ckpt, if the signal came there
        harm(sorted((copy / "last.ckpt").glob("*.safetensors"))[0])
        with pytest.raises(DamagedError, match=r"is damaged, the content of shard-.* does not match its SHA-256; use"):
            read_checkpoint(copy / "last.ckpt")
        path, content = newest_good_checkpoint(copy)
        assert path.name == "previous.ckpt"
        assert content["global_step"] < saved

    resumed, undisturbed = ranks(f"resume={cut}"), ranks(*common, f"hydra.run.dir={whole}")
    for process in resumed, undisturbed:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert losses(cut) == losses(whole)
    ends = [
        tensors_in(read_file_or_parts(run / "checkpoints" / "last.ckpt", "ckpt_path", kinds=BOTH))
        for run in (cut, whole)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(tensor.equal(ends[1][name]) for name, tensor in ends[0].items())


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def test_a_folder_with_a_pipe_is_not_read(tmp_path):
    parts = tmp_path / "last.ckpt"
    parts.mkdir()
    (parts / "manifest.json").write_text("{}")
    os.mkfifo(parts / "rest.ckpt")
    assert newest_good_checkpoint(tmp_path) is None
    with pytest.raises(DamagedError, match="is not a regular file"):
        read_checkpoint(parts)


class OtherGPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.ones(3))


def test_sharded_models_start_without_weights(monkeypatch):
    config = check(cli.compose("train", ["model=gpt2_tiny", "model.vocab_size=50304"]))
    module = build_module(config, "cpu", sharded=True)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    monkeypatch.setitem(ARCHITECTURES, "other", OtherGPT)
    other = build_module(config.changed(model=config.model.changed(architecture="other")), "cpu", sharded=True)
    assert other.net.scale.tolist() == [1, 1, 1]  # shard() knows GPT only


def test_parts_are_for_sharded_models():
    with pytest.raises(ValueError, match=r"checkpoint\.in_parts=true is for sharded models; use trainer=fsdp or"):
        check(cli.compose("train", ["checkpoint.in_parts=true"]))
    check(cli.compose("train", ["checkpoint.in_parts=true", "trainer=fsdp"]))
