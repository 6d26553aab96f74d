"""What runs out or dies is told in one line, with what to change; nothing hangs, nothing is lost."""

import fcntl
import json
import math
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import FAST, column
from interrupting import first_difference, interrupt
from test_config import BAD

from src.checkpoint.find import read_checkpoint
from src.cli.overrides import CONF
from src.cli.streams import lasting_output
from src.files import read_json, write_json
from src.runs.record import read_record


def start(folder, *arguments: str, module: str = "src.train", **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(CONF.parent)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


TINY = ("model=gpt2_tiny", "model.context_length=16", "trainer.accelerator=cpu", "callbacks=none", "logger=csv")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: "
                                 "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("batch", "accumulate", "cure"),
    [
        (4, 1, "data.batch_size=2 trainer.accumulate_grad_batches=2"),
        (3, 2, "data.batch_size=1 trainer.accumulate_grad_batches=6"),
        (1, 2, "model.context_length=8 trainer.accumulate_grad_batches=4"),
    ],
)
def test_out_of_memory(tiny_run, at_batch, tmp_path, error, batch, accumulate, cure):
    def fail(module):
        raise error

    at_batch(7, fail)
    with pytest.raises(ValueError, match=f"^out of memory; use {cure} for less memory"):
        tiny_run("callbacks=none", f"data.batch_size={batch}", f"trainer.accumulate_grad_batches={accumulate}",
                 "checkpoint.every_steps=1", folder=tmp_path / "run")  # fmt: skip
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 7 // accumulate
    assert read_record(tmp_path / "run")["status"] == "oom"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures itself in Linux's /proc")
def test_real_lack_of_memory(tmp_path):
    """Under a limit of the system; the exit status is not 0, and the line is the last but for the run folder's."""
    code = (
        "import resource, runpy, sys, torch, lightning.pytorch\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 10**9,) * 2)\n"
        "sys.argv[0] = 'train'\n"
        "runpy.run_module('src.train', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY[2:], "model=gpt2_tiny", "model.context_length=64", "data.batch_size=256",
         "data.stride=1", "trainer.max_steps=2", "trainer.limit_val_batches=0"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CONF.parent)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: out of memory; use data.batch_size=128" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_failure_with_workers_alive_is_no_hang(tmp_path):
    process = start(tmp_path, *TINY, "data.num_workers=2", "optimizer.learning_rate=1e30", "schedule=constant",
                    "trainer.gradient_clip_val=null", "trainer.limit_val_batches=0")  # fmt: skip
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"error: step \d was not made: .*optimizer\.learning_rate=", output)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the worker in Linux's /proc")
def test_dead_data_worker(tmp_path, trials):
    """A worker that the system kills: one line, no hang, and the run can be resumed."""
    process = start(tmp_path, *TINY, "data.num_workers=2", "trainer.max_epochs=400", "checkpoint.every_steps=5",
                    "hydra.run.dir=run", "data.batch_size=8")  # fmt: skip
    while process.poll() is None and not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    killed = [int(child) for child in children if b"src.train" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(killed[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: a data worker died, often for lack of memory; use resume=" in output
    assert "Traceback" not in output
    assert read_record(tmp_path / "run")["status"] == "failed"
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] % 5 == 0
    trials.passed("disk full, dead worker, out of memory", 1, "no hang, a clear line, the old checkpoint loads")


def test_full_disk_before_the_start(tiny_run, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(
        ValueError,
        match=r"has 0\.0001 GB free, two checkpoints take 0\.00101 GB; free some space, or use hydra\.run\.dir=",
    ):
        tiny_run(*FAST[:1])
    tiny_run(*FAST, "trainer.max_steps=1", "logger=none")


def test_full_disk_in_a_run(tiny_run, tmp_path, monkeypatch):
    from src.checkpoint import storage

    real, calls = storage.torch.save, []

    def save(content, file):
        real(content, file)
        calls.append(file)
        if len(calls) == 3:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(storage.torch, "save", save)
    with pytest.raises(OSError, match="could not be written") as error:
        tiny_run("callbacks=none", "trainer.limit_val_batches=0", "checkpoint.every_steps=2", folder=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.glob("run/checkpoints/*")) == ["last.ckpt", "previous.ckpt"]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert read_record(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_all_processes_of_a_job(tmp_path, number):
    """As schedulers and service managers send it: the data workers leave it to the run."""
    process = start(tmp_path, *TINY, "data.num_workers=2", "trainer.max_epochs=400", "hydra.run.dir=run",
                    "trainer.limit_val_batches=0", "data.batch_size=8", start_new_session=True)  # fmt: skip
    while process.poll() is None and not (tmp_path / "run" / "metrics.csv").exists():
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert read_record(tmp_path / "run")["status"] == "interrupted"
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] > 0
    assert "to continue: python -m src.train resume=" in output


def test_terminal_goes_away(tmp_path):
    """SIGHUP, and nobody to write to: saved within the step, exit status 129."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *TINY, "trainer.max_epochs=400", "hydra.run.dir=run",
         "trainer.limit_val_batches=0", "data.batch_size=8"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CONF.parent)}, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    while process.poll() is None and not (tmp_path / "run" / "metrics.csv").exists():
        if select.select([ours], [], [], 0.01)[0]:
            os.read(ours, 4096)
    os.close(ours)
    assert process.wait(60) == 129
    record = read_record(tmp_path / "run")
    assert (record["status"], record["error"]) == ("interrupted", "SIGHUP")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == record["optimizer_steps"]
    assert "to continue: python -m src.train resume=" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("output", [">&- 2>&-", "<&- >&- 2>&-", "2>&1 | true"])
def test_nobody_takes_the_output(tmp_path, output):
    run = [sys.executable, "-m", "src.train", *TINY, "trainer.max_steps=3", "hydra.run.dir=run"]
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{shlex.join(run)} {output}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CONF.parent)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert read_record(tmp_path / "run")["status"] == "completed"
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert "parameters" in lines[0]
    assert "run folder: " in lines[-1]


def test_stream_that_fails_is_let_go(tmp_path, monkeypatch):
    """As a full disk under ``> file``."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with lasting_output():
            for _ in range(3):
                print("x" * 10_000, flush=True)
        assert sys.stdout is full


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_never_holds_what_is_no_number(tmp_path, number):
    def refuse(constant):
        raise AssertionError(constant)

    path = tmp_path / "any.json"
    before = os.umask(0o027)
    try:
        write_json(path, {"a": number, "b": [1.5, (number, {"c": number})], "d": "NaN"})
    finally:
        os.umask(before)
    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"a": str(number), "b": [1.5, [str(number), {"c": str(number)}]], "d": "NaN"}
    assert str(float(read["a"])) == str(number)
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["any.json"]
    assert read_json(path) == read


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "kills"), [(["TERM", "KILL"], 2), (["KILL"], 50), (["TERM", "INT"], 20)])
def test_real_signals_at_random_moments(tmp_path, signals, kills, trials):
    """Exit status 143 or 130, saved within one step, resumed, bit-identical."""
    if trials.full != (kills > 3):
        pytest.skip("all of them with --full, a few without")
    overrides = [
        *TINY, f"trainer.max_epochs={trials(1, 3)}", "data.batch_size=4", "trainer.accumulate_grad_batches=2",
        "eval.every_steps=9", "eval.batches=2", "checkpoint.every_steps=5",
    ]  # fmt: skip
    statuses = interrupt(tmp_path, overrides, kills, signals)
    assert set(statuses) <= {0, -9, 143, 130}
    promise, outcome = "SIGTERM and SIGINT at random moments", "saved within one step, exit 143 and 130, bit-identical"
    if signals == ["KILL"]:
        promise, outcome = (
            "SIGKILL at random moments, saves included",
            "resumed, bit-identical to the uninterrupted run",
        )
    trials.passed(promise, len(statuses), outcome)


def test_a_difference_is_found(tiny_run):
    """The comparison can fail: another seed on the way gives the first step that differs."""
    one, two = (tiny_run("callbacks=none", f"seed={seed}", "trainer.max_steps=3").folder for seed in (1, 2))
    assert first_difference(one, one) is None
    assert first_difference(one, two).startswith("step 0, train/eval_loss: ")


@pytest.mark.parametrize("overrides", BAD)
def test_bad_override_on_the_real_command_line(tmp_path, overrides, trials):
    if not trials.full and list(BAD).index(overrides) % 16:
        pytest.skip("all of them with --full")
    started = time.perf_counter()
    done = start(tmp_path, *overrides.split())
    output, _ = done.communicate(timeout=60)
    seconds = time.perf_counter() - started
    assert done.returncode == 1
    assert len(output.splitlines()) <= 3
    assert output.startswith("error: ")
    assert BAD[overrides] in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []
    if seconds < 5:  # a figure for the table, no condition of the test
        trials.passed("bad overrides", 1, "within 3 lines, naming key and cure, no traceback, under 5 s")


CALLBACKS = ["throughput", "perplexity", "console", "text_samples", "loss_plot"]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_each_callback_changes_nothing(tiny_run, callback, trials):
    common = ("data.batch_size=4", "trainer.max_epochs=2")
    others = [f"~callbacks.{other}" for other in CALLBACKS if other != callback]
    with_it = tiny_run(*common, *others, "eval.every_steps=3")
    without = tiny_run(*common, *FAST)
    assert column(with_it, "train/loss") == column(without, "train/loss")
    trials.passed("with and without each callback, sampling and evaluation", 1, "losses bit-identical")
