"""An interrupted run, resumed, is bit-identical to one that was not; what could not be its continuation is refused."""

import hmac
import json
import os
import random
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from conftest import FAST, TINY, column
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from interrupting import first_difference
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.checkpoint.find import read_checkpoint
from src.checkpoint.interruption import Interrupted
from src.cli import overrides as cli
from src.cli.quoting import as_meant, as_typed, command_line, quoted, resume_override
from src.cli.resume import resumed_overrides
from src.files import link
from src.runs.record import read_record, signature
from src.training.optim import learning_rate_at
from src.training.sections import ScheduleConfig

WATCHED = ("callbacks.text_samples.max_new_tokens=3", "~callbacks.loss_plot", "eval.batches=2")
SETTINGS = {  # 12 batches an epoch of 4 windows, 2 epochs
    "plain": (),
    "accumulation": ("trainer.accumulate_grad_batches=3",),
    "uneven accumulation": ("trainer.accumulate_grad_batches=5",),
    "overlapping windows": ("data.stride=11",),
    "shifted windows": ("data.stride=11", "data.shift=true", "data.num_workers=2"),
    "bounded by steps": ("trainer.max_epochs=null", "trainer.max_steps=19"),
    "few logs": ("trainer.log_every_n_steps=3",),
    "no evaluation": ("trainer.limit_val_batches=0",),
    "part of an epoch": ("trainer.limit_train_batches=5",),
    "workers": ("data.num_workers=2",),
    "bf16": ("trainer.precision=bf16-mixed",),
    "muon": ("optimizer=muon", "schedule=warmup_stable_decay"),
}


def interrupt(number: int = signal.SIGTERM):
    return lambda module: signal.raise_signal(number)


@pytest.mark.parametrize("setting", SETTINGS)
def test_interrupted_at_any_step(tiny_run, at_batch, setting, trials):
    """Dropout, shuffling, evaluation, samples and both loggers on."""
    if not trials.full and setting not in (
        "plain",
        "uneven accumulation",
        "bounded by steps",
        "shifted windows",
        "muon",
    ):
        pytest.skip("all of them with --full")
    common = (*WATCHED, "trainer.max_epochs=2", "data.batch_size=4", "eval.every_steps=4", *SETTINGS[setting])
    whole = tiny_run(*common)
    batches = whole.trainer.fit_loop.epoch_loop.total_batch_idx + 1
    draw = random.Random(setting)
    edges = [0, whole.trainer.num_training_batches - 1, batches - 1]
    moments = [draw.choice(edges), *(draw.randrange(batches) for _ in range(9))][: trials(1, 10)]
    for batch in moments:
        at_batch(batch, interrupt())
        with pytest.raises(Interrupted) as interrupted:
            tiny_run(*common, folder=whole.folder.with_name(f"cut{batch}"))
        assert interrupted.value.code == 143
        folder = whole.folder.with_name(f"cut{batch}")
        assert read_record(folder)["status"] == "interrupted"
        tiny_run(*common, resume=folder)
        assert first_difference(whole.folder, folder) is None, batch
        shutil.rmtree(folder)
    trials.passed("interrupted at random steps: dropout, shuffling, accumulation, workers, evaluation, samples",
                  len(moments), "bit-identical")  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_saves_within_one_step(tiny_run, at_batch, number, tmp_path):
    at_batch(5, interrupt(number))
    with pytest.raises(Interrupted) as interrupted:
        tiny_run("callbacks=none", "data.batch_size=4", folder=tmp_path / "run")
    assert interrupted.value.code == 128 + number
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    record = read_record(tmp_path / "run")
    assert (record["status"], record["optimizer_steps"], record["error"]) == (
        "interrupted",
        6,
        interrupted.value.signal.name,
    )


def test_a_second_signal_does_no_harm(tiny_run, at_batch, tmp_path):
    at_batch(
        5, lambda module: [signal.raise_signal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)]
    )
    with pytest.raises(Interrupted) as interrupted:
        tiny_run("callbacks=none", "data.batch_size=4", folder=tmp_path / "run")
    assert interrupted.value.code == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sighup_under_nohup_is_ignored(tiny_run, at_batch, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_batch(5, interrupt(signal.SIGHUP))
        assert tiny_run("callbacks=none", "data.batch_size=4").record["status"] == "completed"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("place", ["src.data.datamodule.read_split", "src.checkpoint.storage.torch.load",
                                   "src.callbacks.text_samples.generate"])  # fmt: skip
def test_interrupted_while_tokenising_restoring_or_sampling(tiny_run, tmp_path, monkeypatch, place):
    common = (*WATCHED, "data.batch_size=4")
    whole = tiny_run(*common)
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        if place.endswith("torch.load"):
            patch.setattr("src.callbacks.text_samples.generate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
            with pytest.raises((Interrupted, TypeError)):
                tiny_run(*common, folder=folder)
        patch.setattr(place, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises((Interrupted, TypeError)):
            tiny_run(*common, **{"resume" if folder.exists() else "folder": folder})
    tiny_run(*common, resume=folder)
    assert first_difference(whole.folder, folder) is None


def test_tensorboard_curve_without_overlap(tiny_run, at_batch, tmp_path):
    common = ("data.batch_size=4", "eval.every_steps=3", "callbacks=none", "checkpoint.every_steps=5")
    common += ("eval.batches=1",)

    def die(module):
        raise RuntimeError("killed")

    at_batch(9, die)  # logged up to step 9, saved at step 5
    with pytest.raises(RuntimeError, match="killed"):
        tiny_run(*common, folder=tmp_path / "run")
    tiny_run(*common, resume=tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("training/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("loss/val")] == [0, 3, 6, 9, 12]
    assert [event.step for event in events.Scalars("vs_tokens/training_loss")] == [64 * n for n in range(1, 13)]
    assert [event.step for event in events.Scalars("vs_tokens/loss_val")] == [64 * n for n in (0, 3, 6, 9, 12)]


def test_resume_takes_its_own_overrides_and_new_ones(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "gpt2" / "a run, with 'odd' name"
    run = tiny_run("callbacks=none", "trainer.max_steps=2", folder=folder)
    record = read_record(run.folder) | {"overrides": ["model=gpt2_tiny", "data.path='a b'", "weights=x", "seed=4"]}
    (run.folder / "run.json").write_text(json.dumps(record))
    for asked in str(folder), "latest":
        arguments = resumed_overrides(["seed=5", f"resume={asked}"])
        assert arguments[:4] == ["model=gpt2_tiny", "data.path='a b'", "weights=x", "seed=5"]
        cfg = cli.compose("train", arguments[:-2])
        assert (Path(cfg.resume).name, cfg.seed, cfg.data.path) == (folder.name, 5, "a b")
    with pytest.raises(ValueError, match="starts from its own checkpoint; leave out weights"):
        resumed_overrides(["weights=y", "resume=latest"])
    assert resumed_overrides(["seed=5", "resume=null"]) == ["seed=5", "resume=null"]
    assert resumed_overrides(["resume=latest", "--cfg", "job"])[:2] == ["--cfg", "job"]
    assert "model.n_layers=3" not in resumed_overrides(["resume=latest", "model=gpt2_tiny"])
    assert resumed_overrides(["++resume=latest"])[-2].startswith("hydra.run.dir=")


def test_job_that_slurm_starts_again_resumes_its_own_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tiny_run("callbacks=none", "trainer.max_steps=2", folder=tmp_path / "outputs" / "gpt2" / "one")
    mine = ["model=gpt2_tiny", "weights=w.ckpt"]
    record = read_record(run.folder) | {"status": "interrupted", "job_id": "77", "overrides": mine}
    (run.folder / "run.json").write_text(json.dumps(record | {"command": command_line(mine)}))
    assert resumed_overrides(mine) == mine
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert resumed_overrides(mine) == mine
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resumed_overrides([*mine, "hydra.run.dir=outputs/gpt2/one"])[:3] == [*mine, "resume='outputs/gpt2/one'"]
    assert resumed_overrides(mine)[:3] == [*mine, "resume='outputs/gpt2/one'"]
    for other in ["model=gpt2_tiny"], ["-m", *mine]:  # another command of the same job, a sweep
        assert resumed_overrides(other) == other
    (run.folder / "run.json").write_text(json.dumps(record | {"command": command_line(mine), "status": "completed"}))
    assert resumed_overrides(mine) == mine


CODE = "+callbacks.mine._target_=lightning.pytorch.callbacks.LambdaCallback"


@pytest.fixture
def begun(command, at_batch, text, tmp_path, monkeypatch):
    """The command of a run with code of its user's own, stopped at step 6 of 12 by SLURM's signal, and its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    arguments = [*TINY, "callbacks=none", CODE, f"data.path={text}", "+tags=[a]", "data.batch_size=4",
                 "trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.precision=32-true"]  # fmt: skip
    at_batch(5, interrupt(signal.SIGUSR1))
    assert command("train", *arguments)[0] == 128 + signal.SIGUSR1
    (folder,) = tmp_path.glob("outputs/gpt2/*")
    return arguments, folder


def test_a_run_with_its_users_own_code_is_continued_by_its_user(begun, command, tmp_path):
    _, folder = begun
    assert resumed_overrides([f"resume={folder}", "dry_run=true"])[-1] == "hydra.output_subdir=null"
    assert resumed_overrides([f"resume={folder}"])[-1] == "hydra.output_subdir=.hydra/resumed_1"
    assert command("train", f"resume={folder.rename(tmp_path / 'moved')}", "tags=[b]")[0] == 0
    record = read_record(tmp_path / "moved")
    assert (record["status"], record["optimizer_steps"], record["config"]["tags"]) == ("completed", 12, ["b"])
    assert "LambdaCallback" in str(record["config"]["callbacks"])


def test_and_by_its_requeued_job(begun, command, monkeypatch):
    arguments, folder = begun
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "run.json"))  # no key can be kept: the command is proof enough
    assert command("train", *arguments)[0] == 0
    assert read_record(folder)["status"] == "completed"
    assert read_record(folder)["resumed_at"] == [6]


@pytest.mark.parametrize("key", ["resume", "ckpt_path"])
@pytest.mark.parametrize("forged", ["another user", "no signature", "other overrides", "an empty key"])
def test_but_not_by_anybody_else(begun, command, monkeypatch, tmp_path, forged, key):
    _, folder = begun
    record = read_record(folder)
    if forged == "another user":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    elif forged == "no signature":
        record["signature"] = None
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "run.json"))  # nor can one be made
    elif forged == "other overrides":
        record["overrides"][0] = "model=gpt2_small"
    else:
        (tmp_path / "state" / "gpt2-lightning").mkdir(parents=True)
        (tmp_path / "state" / "gpt2-lightning" / "key").touch()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        record["signature"] = hmac.new(b"", json.dumps(record["overrides"]).encode(), "sha256").hexdigest()
    (folder / "run.json").write_text(json.dumps(record))
    status, _, err = command("train", f"{key}={folder}", "dry_run=true")
    assert (status, err.count("\n")) == (1, 1)
    assert f"{key}={folder} would execute lightning.pytorch.callbacks.LambdaCallback" in err
    if forged != "other overrides":
        assert command("train", f"{key}={folder}", CODE, "dry_run=true")[0] == 0  # it is the user's word now


def test_the_key_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    signed = signature(["seed=1"])
    assert signed == signature(["seed=1"]) != signature(["seed=2"])
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_job_that_began_with_the_latest_resumes_its_own_run(tiny_run, at_batch, command, tmp_path, monkeypatch):
    """What latest meant when the job began, not what it would mean now."""
    monkeypatch.chdir(tmp_path)
    tiny_run("callbacks=none", "data.batch_size=4", "trainer.max_steps=2", folder=tmp_path / "outputs" / "gpt2" / "one")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    at_batch(3, interrupt(signal.SIGUSR1))
    arguments = ["weights=latest", f"data.path={tmp_path / 'text.txt'}", "callbacks=none", "trainer.max_steps=6",
                 "trainer.accelerator=cpu", "name=two"]  # fmt: skip
    assert command("train", *arguments)[0] == 128 + signal.SIGUSR1
    (folder,) = tmp_path.glob("outputs/two/*")
    assert read_record(folder)["command"] == command_line(arguments)
    assert read_record(folder)["config"]["weights"] == "outputs/gpt2/one"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert command("train", *arguments)[0] == 0
    assert read_record(folder)["status"] == "completed"
    assert read_record(folder)["resumed_at"] == [4]


@pytest.mark.parametrize("asked", ["latest", "outputs/gpt2/one", "outputs/gpt2/one/checkpoints/last.ckpt"])
def test_a_checkpoint_brings_its_runs_config(asked, command, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [*TINY, f"data.path={text}", "callbacks=none", "data.batch_size=4", "trainer.max_epochs=1", "seed=5",
           "trainer.accelerator=cpu", "trainer.precision=32-true", "schedule=constant", "+tags=[a]"]  # fmt: skip
    assert command("train", *own, "hydra.run.dir=outputs/gpt2/one")[0] == 0
    before = (tmp_path / "outputs/gpt2/one/run.json").read_text()
    status, _, err = command("train", f"ckpt_path={asked}", "trainer.max_epochs=2", "tags=[b]", "name=more")
    assert status == 0, err
    assert (tmp_path / "outputs/gpt2/one/run.json").read_text() == before
    (folder,) = tmp_path.glob("outputs/more/*")
    record = read_record(folder)
    assert record["command"] == command_line([f"ckpt_path={asked}", "trainer.max_epochs=2", "tags=[b]", "name=more"])
    assert record["optimizer_steps"] == 24
    config = record["config"]
    assert (config["seed"], config["model"]["n_layers"], config["data"]["batch_size"]) == (5, 2, 4)
    assert config["tags"] == ["b"]
    assert config["ckpt_path"] == "outputs/gpt2/one/checkpoints/last.ckpt"
    _, out, _ = command("train", f"ckpt_path={asked}", "optimizer.learning_rate=1e-5")
    assert "there is nothing left to do" in out


def test_a_checkpoint_alone_brings_its_model(tiny_run, tmp_path):
    run = tiny_run("callbacks=none", "trainer.max_steps=2", "schedule=constant", "model.n_layers=3")
    lone = shutil.copy(run.folder / "checkpoints" / "last.ckpt", tmp_path / "lone.ckpt")
    assert resumed_overrides([f"ckpt_path={lone}", "seed=1"]) == ["seed=1", f"ckpt_path={quoted(lone)}"]
    common = ("callbacks=none", "trainer.max_steps=3", "schedule=constant", f"ckpt_path={lone}")
    run = tiny_run(*common, model=())
    assert (run.module.net.config.n_layers, run.module.net.config.context_length) == (3, 16)
    assert run.record["config"]["data"]["context_length"] == 16
    with pytest.raises(ValueError, match=r"model\.n_layers=4 differs from 3"):
        tiny_run(*common, "model.n_layers=4", model=())


def test_a_run_that_began_with_weights_is_branched_off(command, tmp_path, long_text, monkeypatch, small_weights):
    """Its model is nowhere in its overrides."""
    monkeypatch.chdir(tmp_path)
    own = [f"weights={small_weights}", f"data.path={long_text}", "callbacks=none", "schedule=constant",
           "trainer.accelerator=cpu"]  # fmt: skip
    assert command("train", *own, "trainer.max_steps=2")[0] == 0
    status, _, err = command("train", "ckpt_path=latest", "trainer.max_steps=3")
    assert status == 0, err
    folder = max(tmp_path.glob("outputs/gpt2/*"))
    assert read_record(folder)["optimizer_steps"] == 3
    assert read_record(folder)["config"]["weights"] is None


def test_what_latest_and_ckpt_path_stand_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in "weights", "ckpt_path":
        with pytest.raises(ValueError, match=f"{key}=latest finds no run in .*outputs; use {key}=<run folder>"):
            resumed_overrides([f"{key}=latest"])
    checkpoints = tmp_path / "outputs" / "a" / "b" / "checkpoints"
    checkpoints.mkdir(parents=True)
    record = {"status": "completed", "overrides": ["seed=4", "+tags=[a]", "weights=x", "data=text", "data.path=y"]}
    (checkpoints.parent / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"ckpt_path=latest has no checkpoint in .*; use ckpt_path=<another"):
        resumed_overrides(["ckpt_path=latest"])
    for name in "last.ckpt", "best.ckpt":
        (checkpoints / name).touch()
    assert resumed_overrides(["-m", "weights=gpt2,latest"]) == ["-m", "weights=gpt2,'outputs/a/b'"]
    assert resumed_overrides(["weights=latest"]) == ["weights='outputs/a/b'"]
    for asked in "latest", "outputs/a/b", "outputs/a/b/checkpoints":
        assert resumed_overrides([f"ckpt_path={asked}", "tags=[b]", "data=story", "-m"]) == [
            "-m",
            "seed=4",
            "+tags=[a]",
            "tags=[b]",
            "data=story",
            "ckpt_path='outputs/a/b/checkpoints/last.ckpt'",
        ]
    for as_it_is in "ckpt_path=nowhere", "ckpt_path=null", "ckpt_path=":
        assert resumed_overrides([as_it_is]) == [as_it_is]


def test_latest_is_the_one_that_can_go_on(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run("callbacks=none", "trainer.max_steps=2", folder=tmp_path / "outputs" / "gpt2" / "trained")
    with pytest.raises(ValueError, match="does not exist"):
        tiny_run("data.path=nowhere", folder=tmp_path / "outputs" / "gpt2" / "mistyped")
    tiny_run(*FAST, "trainer.max_steps=1", folder=tmp_path / "outputs" / "other" / "unsaved")
    assert "resume='outputs/gpt2/trained'" in resumed_overrides(["resume=latest"])
    assert "resume='outputs/other/unsaved'" in resumed_overrides(["resume=latest", "name=other"])
    with pytest.raises(ValueError, match=r"finds no run in .*outputs/third"):
        resumed_overrides(["resume=latest", "name=third"])


def test_dry_run_of_a_continuation_leaves_the_run_alone(tiny_run, cut):
    before = {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()}
    tiny_run("callbacks=none", "data.batch_size=4", "dry_run=true", resume=cut)
    assert before == {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()}


def test_changes_are_told(tiny_run, cut, caplog):
    tiny_run("callbacks=none", "data.batch_size=4", "optimizer.learning_rate=1e-5", resume=cut)
    assert "changed: optimizer.learning_rate=1e-05, was 0.0006" in caplog.text


@pytest.mark.parametrize("interval", [3, 5])
def test_checkpoints_lie_between_steps(tiny_run, interval):
    """With Lightning's own interval, in batches, an evaluation can fall between two batches of one step."""
    common = ("callbacks=none", "data.batch_size=4", "trainer.accumulate_grad_batches=2", "schedule=constant",
              f"+trainer.val_check_interval={interval}", "trainer.max_epochs=2")  # fmt: skip
    whole = tiny_run(*common)
    best = whole.folder / "checkpoints" / "best.ckpt"
    step = read_checkpoint(best)["global_step"]
    rest = tiny_run(*common, "trainer.max_epochs=4", f"ckpt_path={best}")
    longer = tiny_run(*common, "trainer.max_epochs=4")
    assert column(longer, "train/loss")[step:] == column(rest, "train/loss")


def test_time_over_in_the_middle_of_a_step(tiny_run, monkeypatch):
    """The step is finished first, and the run can be continued exactly."""
    common = ("callbacks=none", "data.batch_size=4", "trainer.accumulate_grad_batches=5", "schedule=constant")
    whole = tiny_run(*common, "trainer.max_epochs=2")
    from lightning.pytorch.callbacks import Timer

    monkeypatch.setattr(Timer, "_check_time_remaining", lambda self, trainer: setattr(
        trainer, "should_stop", trainer.fit_loop.epoch_loop.total_batch_idx == 6))  # fmt: skip
    cut = tiny_run(*common, "trainer.max_epochs=2", "trainer.max_time=00:01:00:00")
    assert cut.record["optimizer_steps"] == 2
    monkeypatch.undo()
    rest = tiny_run(*common, "trainer.max_epochs=2", f"ckpt_path={cut.folder / 'checkpoints' / 'last.ckpt'}")
    assert column(cut, "train/loss") + column(rest, "train/loss") == column(whole, "train/loss")


def test_a_check_of_overfitting_cannot_be_continued(tiny_run):
    run = tiny_run("callbacks=none", "trainer.overfit_batches=2", "trainer.max_epochs=2")
    with pytest.raises(ValueError, match=r"is a check that cannot be continued; use trainer\.overfit_batches=0"):
        tiny_run("callbacks=none", "trainer.overfit_batches=2", "trainer.max_epochs=3", resume=run.folder)


@pytest.mark.parametrize(
    ("arguments", "record", "message"),
    [
        (["resume=latest"], None, "resume=latest finds no run in .*; use resume=<run folder>"),
        (["resume=nowhere"], None, "resume=nowhere is not a run folder .*; use resume=latest"),
        (["-m", "resume=outputs/a/b"], {"overrides": []}, "cannot be part of a sweep; leave out -m"),
        (["resume=outputs/a/b"], {"overrides": "no list"}, "damaged run.json; use ckpt_path="),
        (["resume=outputs/a/b"], {"overrides": ["+callbacks.x._target_=os.system"]}, "execute os.system; type .*"),
        (["resume=latest"], {"overrides": ["+callbacks.x={_target_:os.system,command:ls}"]}, "would execute"),
        (["resume=latest"], {"overrides": ["hydra.run.dir=/etc"]}, "would use the override hydra.run.dir=/etc"),
        (["resume=latest"], {"overrides": ["--config-dir=/tmp"]}, "would use the override --config-dir=/tmp"),
        (["resume=latest"], {"overrides": ["+callbacks.x='${oc.decode:\"{_${oc.env:NO,target}_: os.getcwd}\"}'"]},
         "would use the override .*; type it again"),
        (["resume=latest"], {"overrides": ["+trainer.plugins=[{_target_:os.abort}]"]}, "would execute os.abort"),
        (["resume=latest"], {"overrides": ["modle=gpt2"]}, "no longer compose"),
    ],
)  # fmt: skip
def test_nothing_to_resume_or_not_to_be_trusted(tmp_path, monkeypatch, arguments, record, message):
    monkeypatch.chdir(tmp_path)
    if record:
        (tmp_path / "outputs" / "a" / "b").mkdir(parents=True)
        (tmp_path / "outputs" / "a" / "b" / "run.json").write_text(json.dumps({"status": "interrupted", **record}))
    with pytest.raises(ValueError, match=message) as error:
        resumed_overrides(arguments)
    assert "\n" not in str(error.value)


@pytest.fixture
def cut(tiny_run, at_batch, tmp_path, tmp_path_factory):
    """A run interrupted at step 6 of 12; trained once, copied for each test."""
    kept = tmp_path_factory.getbasetemp() / "cut at step 6"
    if not kept.exists():
        at_batch(5, interrupt())
        with pytest.raises(Interrupted):
            tiny_run("callbacks=none", "data.batch_size=4", folder=kept)
    return shutil.copytree(kept, tmp_path / "cut")


@pytest.mark.parametrize(
    "change",
    ["model.n_layers=3", "model.emb_dim=48", "model.tie_weights=true", "data.batch_size=2", "data.stride=8", "seed=7",
     "data.train_ratio=0.8", "data.shuffle=false", "data.special_tokens=text", "model.context_length=32",
     "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=3", "optimizer=muon"],
)  # fmt: skip
def test_what_would_be_meaningless_is_refused_with_the_difference(tiny_run, cut, change):
    before = (cut / "run.json").read_text(), (cut / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="differs from") as error:
        tiny_run("callbacks=none", "data.batch_size=4", change, resume=cut)
    key, value = change.split("=")
    (line,) = [
        line
        for line in str(error.value).splitlines()
        if line.startswith(f"{key}={value.title() if value in ('true', 'false') else value} differs from ")
    ]
    assert f"; use {key}=" in line
    assert before == ((cut / "run.json").read_text(), (cut / "metrics.csv").read_text())


def test_another_text_is_refused(tiny_run, cut, text):
    text.write_text(text.read_text().replace("ferry", "merry"))
    with pytest.raises(
        ValueError, match=r"data\.path=.* has another text than .*last\.ckpt was trained on .*; use data\.path=<"
    ):
        tiny_run("callbacks=none", "data.batch_size=4", resume=cut)
    assert read_record(cut)["status"] == "interrupted"


@pytest.mark.parametrize(
    "changes",
    [("data.num_workers=1", "eval.every_steps=2", "trainer.log_every_n_steps=2", "checkpoint.every_steps=1"),
     ("optimizer.learning_rate=1e-5", "trainer.precision=bf16-mixed", "model.drop_rate=0.2", "logger=csv")],
)  # fmt: skip
def test_harmless_changes_pass(tiny_run, cut, changes):
    run = tiny_run("callbacks=none", "data.batch_size=4", *changes, resume=cut)
    assert run.record["status"] == "completed"
    assert run.record["optimizer_steps"] == 12
    assert run.record["resumed_at"] == [6]


def test_numbers_of_both_optimizers_may_change(tiny_run, at_batch, tmp_path):
    at_batch(5, interrupt())
    common = ("callbacks=none", "data.batch_size=4", "optimizer=muon", "schedule=constant")
    with pytest.raises(Interrupted):
        tiny_run(*common, folder=tmp_path / "run")
    new = ("optimizer.learning_rate=1e-5", "optimizer.momentum=0.8", "optimizer.eps=1e-7", "optimizer.weight_decay=0.3")
    groups = tiny_run(*common, *new, resume=tmp_path / "run").trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [1e-5] * 3
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0]
    assert [group.get("momentum") for group in groups] == [0.8, None, None]
    assert [group["eps"] for group in groups[1:]] == [1e-7, 1e-7]


def test_extending_a_run_asks_what_becomes_of_the_learning_rate(tiny_run, cut):
    common = ("callbacks=none", "data.batch_size=4", "trainer.max_epochs=2", "optimizer.learning_rate=1e-3")
    with pytest.raises(
        ValueError,
        match=r"schedule\.on_resume=keep .*6\.89e-04 .*1\.00e-04 from step 12.*schedule\.on_resume=stretch",
    ) as error:
        tiny_run(*common, resume=cut)
    assert "\n" not in str(error.value)
    kept = shutil.copytree(cut, cut.with_name("kept"))
    rates = column(tiny_run(*common, "schedule.on_resume=keep", resume=kept), "lr")
    assert rates[6:12] == pytest.approx(
        [learning_rate_at(step, 12, 1e-3, ScheduleConfig("warmup_cosine")) for step in range(6, 12)]
    )
    assert rates[12:] == pytest.approx([1e-4] * 12)
    rates = column(tiny_run(*common, "schedule.on_resume=stretch", resume=cut), "lr")
    assert rates[6:] == pytest.approx(
        [learning_rate_at(step, 24, 1e-3, ScheduleConfig("warmup_cosine")) for step in range(6, 24)]
    )


def test_a_complete_run_has_nothing_left_to_do(tiny_run, tmp_path):
    run = tiny_run("callbacks=none", "data.batch_size=4", folder=tmp_path / "run")
    before = (run.folder / "run.json").read_text()
    with pytest.raises(
        ValueError, match=r"at step 12 of 12, there is nothing left to do; use trainer\.max_epochs=<more>"
    ):
        tiny_run("callbacks=none", "data.batch_size=4", resume=run.folder)
    assert (run.folder / "run.json").read_text() == before


@pytest.mark.parametrize("links", [0, 1])
def test_killed_before_the_best_checkpoint_has_its_name(tiny_run, tmp_path, monkeypatch, links):
    """last.ckpt is written, best.ckpt still is the one before it, or is missing."""
    common = ("callbacks=none", "data.batch_size=4", "eval.every_steps=2", "checkpoint.every_minutes=null")
    whole, calls = tiny_run(*common), []

    def killed(path, name):
        calls.append(name)
        if len(calls) > links:
            raise RuntimeError("killed")
        link(path, name)

    with monkeypatch.context() as patch:
        patch.setattr("src.checkpoint.plugin.link", killed)
        with pytest.raises(RuntimeError, match="killed"):
            tiny_run(*common, folder=tmp_path / "cut")
    saved = read_checkpoint(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 2 * (links + 1)
    # far too high a rate: whatever comes now is worse
    run = tiny_run(*common, "optimizer.learning_rate=5", "schedule=constant", resume=tmp_path / "cut")
    best = read_checkpoint(run.folder / "checkpoints" / "best.ckpt")
    assert best["global_step"] == saved["global_step"]
    assert best["run"]["metrics"]["val/loss"] == min(column(run, "val/loss"))
    assert read_checkpoint(whole.folder / "checkpoints" / "best.ckpt")["global_step"] == 12


def test_interrupted_in_the_last_evaluation(tiny_run, tmp_path, monkeypatch):
    """Trained to its end and saved; what is left to do is done."""
    common = ("callbacks=none", "data.batch_size=4", "eval.batches=1")
    whole = tiny_run(*common)
    from lightning.pytorch import Trainer

    fit = Trainer.fit

    def then_stop(self, *args, **kwargs):
        fit(self, *args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", then_stop)
        with pytest.raises(Interrupted):
            tiny_run(*common, folder=tmp_path / "cut")
    run = tiny_run(*common, resume=tmp_path / "cut")
    assert run.record["status"] == "completed"
    assert first_difference(whole.folder, run.folder) is None


def test_damaged_checkpoint_falls_back_and_still_arrives_at_the_same(tiny_run, at_batch, tmp_path, caplog):
    common = ("callbacks=none", "data.batch_size=4", "checkpoint.every_steps=2")
    whole = tiny_run(*common)
    folder = tmp_path / "cut"
    at_batch(7, interrupt())
    with pytest.raises(Interrupted):
        tiny_run(*common, folder=folder)
    last = folder / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    run = tiny_run(*common, resume=folder)
    assert "last.ckpt is damaged, its content does not match its SHA-256" in caplog.text
    assert run.record["resumed_at"] == [6]
    assert first_difference(whole.folder, folder) is None
    for path in folder.glob("checkpoints/*"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="has no checkpoint that can be read"):
        tiny_run(*common, resume=folder)


def test_moved_folder_keeps_its_best(tiny_run, at_batch, tmp_path):
    common = (
        "callbacks=none",
        "trainer.max_steps=12",
        "eval.every_steps=2",
        "optimizer.learning_rate=3.0",
    )  # overshoots
    whole = tiny_run(*common)
    at_batch(7, interrupt())
    with pytest.raises(Interrupted):
        tiny_run(*common, folder=tmp_path / "cut")
    (tmp_path / "cut").rename(tmp_path / "moved")
    tiny_run(*common, resume=tmp_path / "moved")
    assert first_difference(whole.folder, tmp_path / "moved") is None
    assert read_checkpoint(tmp_path / "moved" / "checkpoints" / "best.ckpt")["global_step"] < 8


def test_two_processes_cannot_share_a_folder(tiny_run, cut, monkeypatch):
    monkeypatch.setattr("src.runs.record.LINGERING", 0.1)
    with FileLock(cut / ".lock"), pytest.raises(ValueError, match="is in use by another process; stop that"):
        tiny_run("callbacks=none", "data.batch_size=4", resume=cut)
    with pytest.raises(
        ValueError,
        match=r"already holds a run \(run.json, tokenizer.json, metrics.csv, checkpoints, "
        r"events.out.tfevents.\*.*\); use resume=",
    ):
        tiny_run("callbacks=none", folder=cut)


@pytest.mark.parametrize("beginning", ["weights", "ckpt_path"])
def test_stopped_before_its_first_checkpoint_it_begins_again_as_it_began(tiny_run, at_batch, tmp_path, beginning):
    first = tiny_run("callbacks=none", "data.batch_size=4", "trainer.max_steps=4", "schedule=constant")
    common = ("callbacks=none", "data.batch_size=4", "schedule=constant", "trainer.limit_val_batches=0",
              f"{beginning}={first.folder / 'checkpoints' / 'last.ckpt'}")  # fmt: skip
    whole = tiny_run(*common)

    def die(module):
        raise RuntimeError("killed")

    at_batch(6, die)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_run(*common, folder=tmp_path / "cut")
    run = tiny_run(*common, resume=tmp_path / "cut")
    assert first_difference(whole.folder, run.folder) is None
    assert run.record["resumed_at"] == [4 if beginning == "ckpt_path" else 0]
    shutil.rmtree(first.folder)  # no longer needed: the run has checkpoints of its own
    tiny_run(*common, "trainer.max_epochs=2", resume=tmp_path / "cut")


def test_a_refused_continuation_changes_nothing(tiny_run, at_batch, tmp_path):
    common = ("data.batch_size=4", "callbacks=none", "checkpoint.every_steps=5", "trainer.limit_val_batches=0")

    def die(module):
        raise RuntimeError("killed")

    at_batch(8, die)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_run(*common, folder=tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="on_resume"):
        tiny_run(*common, "trainer.max_epochs=2", resume=tmp_path / "run")
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


@pytest.mark.parametrize("bound", [(), ("trainer.max_epochs=null", "trainer.max_steps=12")])
def test_killed_between_best_and_last_of_the_final_step(tiny_run, at_batch, tmp_path, bound):
    """best.ckpt of step 12 of 12, last.ckpt of step 10."""
    common = ("callbacks=none", "data.batch_size=4", "eval.every_steps=4", "checkpoint.every_steps=5", *bound)
    whole = tiny_run(*common, folder=tmp_path / "run")
    cut = shutil.copytree(whole.folder, tmp_path / "cut")
    checkpoints = cut / "checkpoints"
    (checkpoints / "previous.ckpt").replace(checkpoints / "last.ckpt")
    record = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert read_checkpoint(checkpoints / "last.ckpt")["global_step"] == 10
    assert read_checkpoint(checkpoints / "best.ckpt")["global_step"] == 12
    run = tiny_run(*common, resume=cut)
    assert run.record["status"] == "completed"
    assert first_difference(whole.folder, cut) is None  # of the checkpoints too
    assert read_checkpoint(checkpoints / "last.ckpt")["global_step"] == 12
    longer = [
        tiny_run(*common, *bound[:1], "trainer.max_steps=15", "trainer.max_epochs=null", "schedule.on_resume=keep",
                 resume=folder) for folder in (whole.folder, cut)
    ]  # fmt: skip
    assert first_difference(*(run.folder for run in longer)) is None


def test_only_regular_files_are_opened(tiny_run, cut):
    for name in "checkpoints/a.ckpt", "checkpoints/zz.ckpt":
        os.mkfifo(cut / name)
    assert tiny_run("callbacks=none", "data.batch_size=4", resume=cut).record["resumed_at"] == [6]
    (cut / "run.json").unlink()
    os.mkfifo(cut / "run.json")
    assert read_record(cut) == {}
    with pytest.raises(ValueError, match=r"is not a run folder"):
        resumed_overrides([f"resume={cut}"])


@pytest.mark.parametrize(
    "damage",
    [{"seconds": "long"}, {"config": None}, {"resumed_at": 3}, {"command": []}, {"status": {}}, {"seconds": True},
     {"optimizer_steps": None, "val_loss": "low"}],
)  # fmt: skip
def test_damaged_value_of_the_record_is_left_out(tiny_run, cut, damage):
    record = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(record | damage))
    assert not read_record(cut).keys() & damage.keys()
    run = tiny_run("callbacks=none", "data.batch_size=4", resume=cut)
    assert run.record["status"] == "completed"
    assert run.record["resumed_at"] == [6]


@pytest.mark.parametrize("content", ["[]", "{", "", "7", "[" * 100_000])
def test_record_that_is_none_at_all(cut, content):
    (cut / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"damaged run\.json; use ckpt_path=.*last\.ckpt$"):
        resumed_overrides([f"resume={cut}"])
    last = cut / "checkpoints" / "last.ckpt"
    assert resumed_overrides([f"ckpt_path={last}", "seed=1"]) == ["seed=1", f"ckpt_path={quoted(last)}"]  # as if alone


@pytest.mark.parametrize(
    ("damage", "rows"),
    [
        (lambda text: text.replace(b"step,", b"stop,", 1), 0),
        (lambda text: text.replace(b"\n2,", b"\n\xff\xfe,"), 6),
        (lambda text: text.replace(b"\n2,", b"\n2,,,,,,,,,,,,,,,,,"), 6),
        (lambda text: text.replace(b"\n2,", b"\ntwo,"), 6),
        (lambda text: text.replace(b"\n2,", b'\n2"'), 6),
        (lambda text: b"\x00\xff" * 500 + b"\n", 0),
        (lambda text: text[:-7], 6),  # a kill in the middle of the last row: nothing to keep
        (lambda text: b"", 0),
    ],
)
def test_damaged_metrics_are_kept_aside(tiny_run, cut, caplog, damage, rows):
    file = cut / "metrics.csv"
    damaged = damage(file.read_bytes())
    expected = file.read_bytes().split(b"\n")
    file.write_bytes(damaged)
    tiny_run("callbacks=none", "data.batch_size=4", resume=cut)
    aside = list(cut.glob("metrics_damaged_*.csv"))
    if damaged and expected[-3] not in damaged:
        assert [path.read_bytes() for path in aside] == [damaged]
        assert f"{file} is damaged and kept as {aside[0].name}; {rows} of its rows are kept" in caplog.text
    steps = [line.split(b",")[0] for line in file.read_bytes().splitlines()]
    assert steps[0] == b"step"
    assert steps[-1] == b"12"
    assert len(steps) == 1 + rows + 6


NASTY = ["a'b", "end\\", "'q'", 'x"y', "a, b=c", "[x]", "{a}", "$x", "~", "#h", " a ", "???", "\\'", "ü\nx", "a\\,b"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1) | st.sampled_from(NASTY)
       | st.text("${}'\"\\a:,", min_size=1))  # fmt: skip
def test_any_name_passes_through_the_grammar_and_the_interpolations(name):
    path = Path("runs", name)
    override = OverridesParser.create().parse_override(f"hydra.run.dir={quoted(path)}")
    assert OmegaConf.create({"dir": override.value()}).dir == str(path)
    assert as_meant(as_typed(Path(name))) == str(Path(name))
    assert shlex.split(resume_override(path))[-1] == f"resume={path}"


@pytest.mark.parametrize("name", ["a'b", "end\\", "'q', x=[1]"])
def test_folders_with_odd_names(command, tmp_path, monkeypatch, name):
    """The working folder's and the run's; what is printed continues it, pasted into a shell."""
    place = tmp_path / name
    place.mkdir()
    monkeypatch.chdir(place)
    tiny = [
        "model=gpt2_tiny",
        "model.context_length=16",
        "callbacks=none",
        "trainer.accelerator=cpu",
        "schedule=constant",
    ]
    status, out, err = command("train", *tiny, "trainer.max_steps=2", f"hydra.run.dir={quoted(Path(name))}")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"run folder: {place / name}"
    *_, module, resume = shlex.split(f"python -m src.train {resume_override(place / name)}")
    assert module == "src.train"
    for asked, steps in (resume, 3), (f"resume={as_typed(Path(name))}", 4):
        status, out, err = command("train", asked, f"trainer.max_steps={steps}")
        assert (status, err) == (0, ""), out
        assert read_record(place / name)["optimizer_steps"] == steps
    assert {path.name for path in place.iterdir()} == {name}
    assert "4 steps" in (place / name / "train.log").read_text()


@pytest.mark.parametrize("where", ["cwd", "run", "resume", "sweep"])
def test_names_that_hydra_cannot_hold_are_refused(command, tmp_path, monkeypatch, where):
    for name, cure in ("${oc.env:HOME}", "has ${ in its name"), (os.fsdecode(b"\xff"), "is not UTF-8; "):
        place = tmp_path / where / (name if where == "cwd" else "plain")
        place.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(place)
        arguments = {"cwd": [], "run": [f"hydra.run.dir={quoted(Path(name))}"], "resume": [f"resume={name}"],
                     "sweep": ["-m", f"hydra.sweep.dir={quoted(Path(name))}"]}[where]  # fmt: skip
        if where == "resume":
            (place / name).mkdir()
            (place / name / "run.json").write_text('{"overrides": []}')
        status, out, err = command("train", "model=gpt2_tiny", *arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert cure in err
        assert {path.name for path in place.rglob("*") if path.is_file()} <= {"run.json"}


@pytest.mark.parametrize("there", [True, False])
def test_job_id_goes_back_into_the_queue(tiny_run, at_batch, tmp_path, monkeypatch, caplog, there):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    if there:
        scontrol.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
        scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    at_batch(5, interrupt(signal.SIGUSR1))
    with caplog.at_level("INFO"), pytest.raises(Interrupted):
        tiny_run("callbacks=none", "data.batch_size=4", folder=tmp_path / "run")
    assert read_record(tmp_path / "run")["job_id"] == "77"
    if there:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert ("was requeued" if there else "could not be requeued") in caplog.text
