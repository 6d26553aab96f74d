"""Several processes train what one would, end together, and leave one run folder: real runs of two on the CPU."""

import itertools
import json
import math
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import column, story_of
from hypothesis import given
from hypothesis import strategies as st
from interrupting import first_difference, rows_of
from torch.utils.data import DataLoader

from src.checkpoint.find import read_checkpoint
from src.checkpoint.position import rescale_position
from src.cli import overrides as cli
from src.data.shards import header
from src.data.windows import NOT_COUNTED, RankSampler, RankWindows, SeededSampler
from src.runs import launch, processes, start
from src.runs.record import read_record
from src.tokenizer import gpt2_tokenizer
from src.train import check

SAME = ("model.drop_rate=0", "schedule=constant", "eval.every_steps=4", "eval.batches=2", "trainer.max_epochs=null")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
POISON = """
from lightning.pytorch import Callback
class Poison(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 1 and pl_module.batch_index == 2 and pl_module.step_losses:  # not left out
            pl_module.step_losses[-1] = loss.new_tensor(float("nan"))  # the gradient stays finite
"""


def losses(folder: Path, key: str = "train/loss") -> list[float]:
    return [float(row[key]) for row in rows_of(folder / "metrics.csv") if row.get(key)]


def process_of_rank(parent: subprocess.Popen, rank: int) -> int | None:
    for child in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    return None


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    while process.poll() is None:
        saved = folder / "checkpoints" / "last.ckpt"
        if saved.exists() and len(losses(folder)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_two_processes_train_what_one_does(ranks, tmp_path, tiny_run, text):
    """DDP under torchrun; fully sharded from its checkpoint on; from there on one process, with smaller batches."""
    text.write_text(story_of(900)[:885])
    whole = tiny_run(*SAME, "data.batch_size=4", "trainer.max_steps=18", "callbacks=default")
    alone = [column(whole, key) for key in ("train/loss", "val/loss", "train/eval_loss", "val/bits_per_byte")]
    assert len(whole.datamodule.val_windows) % 4
    assert len(whole.datamodule.train_windows) % 4 == 1

    ddp = ranks(*SAME, "data.batch_size=2", "trainer.max_steps=6", by=TORCHRUN)
    out, err = ddp.communicate()
    assert ddp.returncode == 0, err
    (folder,) = (tmp_path / "outputs" / "gpt2").iterdir()
    assert out.count("run folder:") == out.count("step 4/6") == 1
    assert "device      2 x" in out
    assert "step        64 tokens (4 windows of 16)" in out
    assert (folder / "train.log").read_text().count("step 4/6") == 1
    record = read_record(folder)
    assert (record["status"], record["optimizer_steps"], record["tokens_seen"]) == ("completed", 6, 6 * 64)
    assert losses(folder) == pytest.approx(alone[0][:6], abs=2e-5)
    for key, values in zip(("val/loss", "train/eval_loss", "val/bits_per_byte"), alone[1:], strict=True):
        assert losses(folder, key)[:2] == pytest.approx(values[:2], abs=2e-6)
    assert [row["tokens_seen"] for row in rows_of(folder / "metrics.csv")][-1] == "384.0"
    assert (folder / "samples.md").read_text().count("## step") == 3

    last = folder / "checkpoints" / "last.ckpt"
    fsdp = ranks(*SAME, "data.batch_size=2", "trainer.max_steps=12", "trainer=fsdp", f"ckpt_path={last}",
                   f"hydra.run.dir={tmp_path / 'fsdp'}", "schedule=constant")  # fmt: skip
    out, err = fsdp.communicate()
    assert fsdp.returncode == 0, err
    assert losses(tmp_path / "fsdp") == pytest.approx(alone[0][6:12], abs=5e-5)
    states = [read_checkpoint(path) for path in (last, tmp_path / "fsdp" / "checkpoints" / "last.ckpt")]
    (before,), (after,) = (state["optimizer_states"] for state in states)
    assert [group["params"] for group in before["param_groups"]] == [group["params"] for group in after["param_groups"]]
    shapes = [{at: moments["exp_avg"].shape for at, moments in one["state"].items()} for one in (before, after)]
    assert shapes[0] == shapes[1]

    last = tmp_path / "fsdp" / "checkpoints" / "last.ckpt"
    rest = tiny_run(*SAME, "data.batch_size=1", "trainer.accumulate_grad_batches=4", "trainer.max_steps=18",
                    f"ckpt_path={last}")  # fmt: skip
    assert column(rest, "train/loss") == pytest.approx(alone[0][12:], abs=5e-5)
    assert rest.module.tokens_seen == 18 * 64


@pytest.mark.slow
def test_killed_interrupted_and_resumed_to_the_same_bits(ranks, tmp_path):
    """Dropout on. SIGKILL of one process; SIGTERM to the one that started them; SIGTERM to one of them."""
    common = ("data.batch_size=2", "trainer.max_epochs=3", "eval.every_steps=7", "eval.batches=2")
    common += ("checkpoint.every_steps=3", "~callbacks.loss_plot")
    whole = ranks(*common, f"hydra.run.dir={tmp_path / 'whole'}")
    cut = tmp_path / "cut"
    killed = ranks(*common, f"hydra.run.dir={cut}")
    wait_for_step(killed, cut, 4)
    os.kill(process_of_rank(killed, 1), signal.SIGKILL)
    _, err = killed.communicate()
    assert killed.returncode == 1
    assert err.count("error:") == 1
    assert f"error: rank 1 of 2 was killed by SIGKILL, often because memory ran out; use resume={cut}" in err
    assert read_record(cut)["status"] == "failed"

    for step in 12, 18:
        stopped = ranks(f"resume={cut}")
        wait_for_step(stopped, cut, step)
        os.kill(stopped.pid if step == 12 else process_of_rank(stopped, 1), signal.SIGTERM)
        out, err = stopped.communicate()
        assert stopped.returncode == 143
        assert (out + err).count("finishing the step") == (step == 12)
        assert (out + err).count("stopped by SIGTERM, saved") == 1
        assert read_record(cut)["status"] == "interrupted"
        assert read_record(cut)["optimizer_steps"] == read_checkpoint(cut / "checkpoints" / "last.ckpt")["global_step"]

    resumed = ranks(f"resume={cut}")
    for process in whole, resumed:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert first_difference(tmp_path / "whole", cut) is None


@pytest.mark.slow
def test_killed_ranks_are_started_again_and_continue_to_the_same_bits(ranks, tmp_path, trials):
    """Dropout on. SIGKILL of either rank at a random moment, again and again; nobody but torchelastic restarts them."""
    kills = trials(1, 20)
    common = ("data.batch_size=2", f"trainer.max_steps={10 * kills + 10}", "trainer.max_epochs=null",
              "eval.every_steps=7", "eval.batches=2", "checkpoint.every_steps=2", "~callbacks.loss_plot")  # fmt: skip
    whole, cut, draw = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    undisturbed = ranks(*common, f"hydra.run.dir={whole}")
    assert undisturbed.wait() == 0, undisturbed.communicate()
    process = ranks(*common, f"max_restarts={kills}", f"hydra.run.dir={cut}")
    for kill in range(kills):
        wait_for_step(process, cut, 10 * kill + draw.randrange(3, 8))
        time.sleep(draw.uniform(0, 0.2))
        os.kill(process_of_rank(process, draw.randrange(2)), signal.SIGKILL)
        while len(read_record(cut).get("resumed_at", [])) <= kill:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert err.count("a rank has ended, starting all again") == kills
    assert "error" not in out + err
    assert len(read_record(cut)["resumed_at"]) == kills
    assert first_difference(whole, cut) is None
    trials.passed("one of two ranks killed by SIGKILL, with `max_restarts`", kills, "continued to the same bits")


@pytest.mark.slow
def test_two_nodes(ranks, tmp_path, tiny_run):
    """Two agents on one machine, which meet on the loopback; after a rank is killed, torchrun continues the run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    node = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-id=two",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost")  # fmt: skip
    common = (*SAME, "trainer.max_steps=30", "checkpoint.every_steps=2")
    both = [ranks(*common, "data.batch_size=2", "trainer.num_nodes=2", by=node, devices=1) for _ in range(2)]
    while not (folders := list((tmp_path / "outputs").glob("gpt2/*"))):
        time.sleep(0.05)
    wait_for_step(both[0], folders[0], 8)
    os.kill(process_of_rank(both[0], 0) or process_of_rank(both[1], 0), signal.SIGKILL)
    for agent in both:
        out, err = agent.communicate()
        assert agent.returncode == 0, out + err
    assert len(list((tmp_path / "outputs").glob("gpt2/*"))) == 1
    assert len(read_record(folders[0])["resumed_at"]) == 1
    alone = tiny_run(*common, "data.batch_size=4")
    assert losses(folders[0]) == pytest.approx(column(alone, "train/loss"), abs=5e-5)


@pytest.mark.slow
def test_a_nan_on_one_process_stops_all(ranks, tmp_path, tiny_run, text):
    """Until then Muon trains on shards what it does on one process."""
    (tmp_path / "poison.py").write_text(POISON)
    tokens = np.array(gpt2_tokenizer().encode(text.read_text()), dtype="<u2")
    (tmp_path / "shard.bin").write_bytes(header(len(tokens)) + tokens.tobytes())
    common = ("data=shards", f"data.path={tmp_path / 'shard.bin'}", "optimizer=muon", "model.drop_rate=0",
              "schedule=constant", "eval.batches=1", "tokenizer=gpt2")  # fmt: skip
    process = ranks(*common, "data.batch_size=2", "+callbacks.poison._target_=poison.Poison",
                      f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert (out + err).count("error:") == 1
    assert "step 3 was not made: its loss is nan" in out
    (batch,) = json.loads((tmp_path / "run" / "non_finite.json").read_text())["batches"]
    assert [len(window["tokens"]) for window in batch["windows"]] == [16] * 4
    assert read_record(tmp_path / "run")["optimizer_steps"] == 2
    alone = tiny_run(*common, "data.batch_size=4", "trainer.max_steps=2", "callbacks=none")
    assert losses(tmp_path / "run") == pytest.approx(column(alone, "train/loss"), abs=2e-5)


@pytest.mark.slow
def test_a_nan_on_one_process_is_left_out_by_all_on_resume(ranks, tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    process = ranks("data.batch_size=2", "+callbacks.poison._target_=poison.Poison", "eval.batches=1",
                      "trainer.strategy=fsdp", "checkpoint.every_steps=1", "max_restarts=2",
                      "trainer.max_steps=5", f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert (out + err).count("step 3 was not made: its loss is nan") == (out + err).count("error:") == 1
    assert "starting all again" not in err  # it would end in the same way
    (batch,) = json.loads((tmp_path / "run" / "non_finite.json").read_text())["batches"]
    assert [len(window["tokens"]) for window in batch["windows"]] == [16] * 4
    resumed = ranks(f"resume={tmp_path / 'run'}", "skip_batches=[2]")
    _, err = resumed.communicate()
    assert resumed.returncode == 0, err
    record = read_record(tmp_path / "run")
    assert (record["optimizer_steps"], record["tokens_seen"]) == (5, 4 * 64)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["skipped_batches"] == [2]


@pytest.mark.slow
def test_what_all_would_say_is_said_once_and_a_sweep_starts_each_job_anew(ranks, tmp_path, text):
    text.write_text("far too short")
    process = ranks("-m", "data.batch_size=2,3", "hydra.sweep.dir=sweep")
    out, err = process.communicate()
    assert process.returncode == 1
    assert (out + err).count("error: data.path=") == 2
    assert sorted(job.name for job in (tmp_path / "sweep").iterdir() if job.is_dir()) == ["0", "1"]
    assert [read_record(tmp_path / "sweep" / job)["status"] for job in "01"] == ["failed", "failed"]


@given(length=st.integers(1, 60), batch_size=st.integers(1, 5), ranks=st.integers(1, 4), data=st.data())
def test_shares_of_training_are_one_order(length, batch_size, ranks, data):
    """Step b is windows order[b*W*B : (b+1)*W*B] for any number of processes, also behind a resumed position."""
    order = list(SeededSampler(length, True, 7))
    whole = batch_size * ranks
    batches = length // whole
    resumed = data.draw(st.integers(0, batches))
    given_out = []
    for rank in range(ranks):
        sampler = SeededSampler(length, True, 7, multiple=whole, done=resumed * whole)
        share = RankSampler(sampler, batch_size, rank, ranks)
        assert len(share) == batches * batch_size
        given_out.append(list(share))
    for step, b in enumerate(range(resumed, batches)):
        parts = [one[step * batch_size : (step + 1) * batch_size] for one in given_out]
        assert list(itertools.chain(*parts)) == order[b * whole : (b + 1) * whole]


@given(length=st.integers(1, 40), batch_size=st.integers(1, 5), ranks=st.integers(1, 4))
def test_shares_of_evaluation_count_each_window_once(length, batch_size, ranks):
    """In as many batches on each process, so that none waits for another."""
    windows = [(torch.tensor([at]), torch.tensor([at])) for at in range(length)]
    loaders = [DataLoader(RankWindows(windows, batch_size, rank, ranks), batch_size) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert {len(one) for one in batches} == {-(-length // (batch_size * ranks))}
    counted = [target for at in range(len(batches[0])) for one in batches for target in one[at][1].flatten().tolist()]
    assert [target for target in counted if target != NOT_COUNTED] == list(range(length))


@given(
    before=st.integers(1, 6), now=st.integers(1, 6), done=st.integers(0, 9), behind=st.integers(0, 1), data=st.data()
)
def test_position_is_behind_the_same_windows(before, now, done, behind, data):
    """Also for batches to be left out, of which those of another size may only be more."""
    windows = done * math.lcm(before, now)
    skipped, asked = data.draw(st.sets(st.integers(0, 20))), data.draw(st.sets(st.integers(0, 20)))
    count = dict.fromkeys(("ready", "started", "processed"), windows // before) | {
        "completed": windows // before - behind
    }
    progress = {"total": dict(count), "current": dict(count)}
    checkpoint = {"batch_windows": before, "skipped_batches": sorted(skipped)}
    checkpoint["loops"] = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    left = start.Start(SimpleNamespace(skip_batches=tuple(asked)), Path("x"), checkpoint).skip_batches(now)
    rescale_position(checkpoint, now)
    for count in progress.values():
        assert count["ready"] == count["started"] == count["processed"] == windows / now == count["completed"] + behind
    left_out = {at for batch in left for at in range(batch * now, (batch + 1) * now)}
    poisoned = {at for batch in skipped | asked for at in range(batch * before, (batch + 1) * before)}
    assert poisoned <= left_out
    assert {at // now for at in poisoned} == set(left)


def test_another_number_of_devices_keeps_the_step():
    checkpoint = {"processes": 2, "fixed_values": {"data.batch_size": 4, "trainer.accumulate_grad_batches": 3}}

    def said(devices: int, batch_size: int, accumulate: int) -> list[str]:
        cfg = cli.compose("train", [f"data.batch_size={batch_size}", f"trainer.accumulate_grad_batches={accumulate}"])
        return start._other_values(check(cfg), checkpoint, Path("x"), devices)

    assert said(2, 4, 3) == said(1, 8, 3) == said(1, 4, 6) == said(3, 8, 1) == []
    (line,) = said(1, 4, 3)
    assert "a step of 12 windows on 1 devices differs from the 24 on 2 in x" in line
    assert "; use trainer.accumulate_grad_batches=6, or" in line
    (line,) = said(5, 4, 3)
    assert "trainer.devices=2" in line
    assert [line.split("=")[0] for line in said(2, 4, 4)] == ["data.batch_size", "trainer.accumulate_grad_batches"][1:]


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "train"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [({}, (0, 1)), (SLURM, (3, 4)), (ELASTIC, (1, 2)), (SLURM | ELASTIC, (1, 2)),
     (SLURM | {"SLURM_JOB_NAME": "bash"}, (0, 1)), ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1))],
)  # fmt: skip
def test_place_among_the_processes(monkeypatch, environment, place):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (processes.rank(), processes.world_size()) == place
    nodes = 2 if place[1] > 1 else 1
    fits = ["trainer.accelerator=cpu", f"trainer.num_nodes={nodes}", f"trainer.devices={place[1] // nodes}"]
    check(cli.compose("train", fits))
    if place[1] > 1:
        with pytest.raises(ValueError, match=f"but {place[1]} processes were started; use {fits[2]}$"):
            check(cli.compose("train", [*fits[:2], "trainer.devices=3"]))


def test_max_restarts_is_of_our_own_launcher(monkeypatch):
    for name, value in ELASTIC.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"use max_restarts=0, and torchrun --max-restarts=3"):
        check(cli.compose("train", ["trainer.accelerator=cpu", "trainer.devices=2", "max_restarts=3"]))


def test_a_shared_store_is_not_for_restarts(spawned, text):
    process = spawned(*TORCHRUN, "--max-restarts=1", "-m", "src.train", f"data.path={text}")
    out, err = process.communicate()
    assert process.returncode == 1
    assert "error: torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in out + err


def test_no_gpu_to_share_out():
    with pytest.raises(ValueError, match=r"trainer\.devices=8, but this machine (has|has no GPU).*; use trainer\."):
        launch.devices_here({"devices": 8, "accelerator": "auto"})
