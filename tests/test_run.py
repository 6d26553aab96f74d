"""A run as its user meets it: the command, its folder, its sweep."""

import csv
import fcntl
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyte
import pytest
from conftest import column, metrics_of
from omegaconf import OmegaConf

from src.cli.overrides import CONF
from src.cli.sweep import SweepTable
from src.runs.record import git_diff

TINY = ["model=gpt2_tiny", "trainer.max_steps=2"]


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "src.train", *arguments, *TINY],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CONF.parent)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run on the packaged story, as a command; its output and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    done = started(folder, "eval.every_steps=1", "name=first")
    assert done.returncode == 0, done.stderr
    return done, folder / re.search(r"run folder: (.*)$", done.stdout.splitlines()[-1])[1]


def test_folder_holds_what_the_readme_says(finished):
    _, run = finished
    assert run.parent.name == "first"
    assert run.parent.parent.name == "outputs"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}", run.name)
    names = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    changed = {"code.diff"} if git_diff("HEAD") else set()
    assert names - events - changed == {
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        ".lock",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "metrics.csv",
        "plots/loss.png",
        "plots/perplexity.png",
        "run.json",
        "samples.md",
        "train.log",
    }
    assert changed <= names
    assert len(events) == 1


def test_record(finished):
    _, run = finished
    record = json.loads((run / "run.json").read_text())
    assert list(record) == [
        "status", "command", "overrides", "signature", "config", "versions", "git", "data_sha256", "parameters",
        "device", "precision", "best_val_loss", "optimizer_steps", "tokens_seen", "tokens_per_second", "train_loss",
        "val_loss", "val_perplexity", "val_tokens", "seconds",
    ]  # fmt: skip
    assert record["status"] == "completed"
    assert record["command"] == "python -m src.train eval.every_steps=1 name=first model=gpt2_tiny trainer.max_steps=2"
    assert record["config"]["data"]["context_length"] == 64
    assert record["optimizer_steps"] == 2
    assert record["tokens_seen"] == 2 * 2 * 64
    assert record["tokens_per_second"] > 0
    with (run / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["val/loss"]) == record["val_loss"]
    assert float(last["train/eval_loss"]) == record["train_loss"]


def test_console_says_what_matters(finished):
    done, run = finished
    for said in ("parameters", "3,243,776", "windows in", "seen", "steps       2", "precision", "step 2/2: val loss "):
        assert said in done.stdout
    assert "Every effort moves you" in done.stdout
    assert done.stderr == ""
    log = (run / "train.log").read_text()
    assert all(line in log for line in done.stdout.splitlines())


def test_samples(finished):
    _, run = finished
    text = (run / "samples.md").read_text()
    assert re.findall(r"^## (step \d+), epoch", text, re.M) == ["step 0", "step 1", "step 2"]
    assert text.count("Every effort moves you") == 6  # greedy and sampled, before and after each step


def test_no_two_prompts_share_their_noise(tiny_run):
    """Of a level distribution, which is what a high temperature makes, the noise alone is drawn."""
    level = ("sampling.temperature=1e6", "sampling.top_k=null", "prompts=[So,And]", "max_new_tokens=4")
    run = tiny_run("trainer.max_steps=1", *(f"callbacks.text_samples.{setting}" for setting in level))
    drawn = re.findall(r"\*\*temperature.*\*\*\n\n> (?:So|And)((?:.|\n>)*)\n", (run.folder / "samples.md").read_text())
    assert len(drawn) == len({*drawn}) == 4  # two prompts, before and after the step


def test_plots_are_pictures(finished):
    from matplotlib.image import imread

    _, run = finished
    for name in "loss", "perplexity":
        image = imread(run / "plots" / f"{name}.png")
        assert image.shape[0] > 300
        assert image.std() > 0.05


@pytest.mark.slow
def test_two_runs_at_once_and_a_folder_taken(tmp_path, finished):
    _, run = finished
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: started(tmp_path, "callbacks=none", "logger=none"), range(2)))
    assert [done.returncode for done in both] == [0, 0]
    assert len(list(tmp_path.glob("outputs/gpt2/*/run.json"))) == 2
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    taken = started(tmp_path, f"hydra.run.dir={run}")
    assert taken.returncode == 1
    assert f"is not empty; use resume={run} to continue a run, or hydra.run.dir=<a new folder>" in taken.stderr
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere.txt"], "data.path=nowhere.txt does not exist"),
        (["trainer.limit_train_batches=0.0001"], "leave no batch to train on"),
        (["data.train_ratio=0.999"], "validation tokens, one window needs context_length + 1 = 65"),
    ],
)
def test_mistakes_met_later_are_one_line_too(command, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = command("train", *overrides, *TINY)
    assert status == 1
    assert message in out
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sweep", [(), pytest.param(("-m", "seed=1,2"), marks=pytest.mark.slow)])
def test_dry_run_trains_nothing_and_leaves_nothing(tmp_path, sweep):
    done = started(tmp_path, *sweep, "dry_run=true")
    assert done.returncode == 0
    assert "checked, nothing was trained and no run folder is kept" in done.stdout
    assert done.stdout.count("checked    ") == len(sweep)  # the table's jobs
    assert "folder:" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_trained_nothing_leaves_nothing_of_its_own(tiny_run, at_batch, tmp_path):
    def fail(module):
        raise error

    for error in RuntimeError("unexpected"), MemoryError():
        at_batch(0, fail)
        folder = tmp_path / "runs" / type(error).__name__
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
        with pytest.raises((RuntimeError, ValueError), match=r"unexpected|out of memory"):
            tiny_run(folder=folder)
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert not list(tiny_run("dry_run=true", folder=folder).folder.glob("run.json"))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    at_batch(1, fail)
    with pytest.raises(ValueError, match="out of memory"):
        tiny_run("callbacks=none", folder=folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "oom"  # after its first step


def test_sweep_table_copes_with_any_record(tmp_path, capsys):
    for number, record in enumerate(
        ['{"status": "completed", "val_loss": 3.5}', '{"val_loss": "low"}', "[", '{"status": 3}']
    ):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
        (tmp_path / str(number) / "run.json").write_text(record)
    with pytest.raises(SystemExit):
        SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:-1]] == [
        "completed",
        "failed",
        "failed",
        "3",
    ]


@pytest.mark.slow
def test_sweep_reports_each_job_and_outlives_a_failure(tmp_path):
    done = started(tmp_path, "-m", "optimizer.learning_rate=1e-4,3e-3", "model.n_heads=4,5", "logger=csv")
    assert done.returncode == 1  # two of the four jobs failed
    table = done.stdout.split("val loss  status")[-1]
    jobs = re.findall(r"^ *(\S+)  (completed|failed) +(\d)  (.*)$", table, re.M)
    assert [(status, number) for _, status, number, _ in jobs] == [
        ("completed", "2"), ("completed", "0"), ("failed", "1"), ("failed", "3"),
    ]  # fmt: skip
    assert "optimizer.learning_rate=0.003" in jobs[0][3] or "optimizer.learning_rate=3e-3" in jobs[0][3]
    (sweep,) = tmp_path.glob("outputs/gpt2/*_sweep")
    assert str(sweep.name) in done.stdout.splitlines()[-1]
    assert "model.emb_dim=32 is not divisible by model.n_heads=5" in (sweep / "1" / "train.log").read_text()
    assert "Traceback" in (sweep / "1" / "train.log").read_text()
    losses = [json.loads((sweep / job / "run.json").read_text())["val_loss"] for job in ("2", "0")]
    assert losses == sorted(losses)


@pytest.mark.parametrize("columns", [80, pytest.param(140, marks=pytest.mark.slow)])
def test_terminal_shows_every_evaluation_and_one_bar(tmp_path, columns):
    """As a terminal shows it: what a progress bar has written over is gone."""
    screen = pyte.HistoryScreen(columns, 50, history=2000, ratio=1)
    terminal, ours, theirs = pyte.ByteStream(screen), *pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *TINY, "tokenizer=byte", "trainer.max_steps=40", "logger=csv"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CONF.parent), "TERM": "xterm-256color"},
        stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    bars = []
    while select.select([ours], [], [], 120)[0]:
        try:
            terminal.feed(os.read(ours, 4096))
        except OSError:
            break
        bars.append([line for line in screen.display if re.match(r"step +\d+/40 ━", line)])
    assert process.wait() == 0
    rows = [*screen.history.top, *(screen.buffer[at] for at in range(screen.lines))]
    lines = ["".join(row[at].data for at in range(columns)).rstrip() for row in rows]
    (run,) = tmp_path.glob("outputs/*/*")
    with (run / "metrics.csv").open(newline="") as file:
        evaluated = [row["step"] for row in csv.DictReader(file) if row["val/loss"]]
    shown = [re.match(r"step (\d+)(/40)?: val loss \d", line) for line in lines]
    assert [found[1] for found in shown if found] == evaluated
    assert len(evaluated) == 21
    assert max(map(len, bars)) == 1
    assert any(
        re.search(r"loss \d+\.\d{3}, [\d,]+ tokens/s, 0:00:\d\d left$", bar.rstrip()) for (bar,) in filter(None, bars)
    )
    assert not any("━" in line or "Epoch" in line for line in lines)
    assert any(line.startswith("greedy | Every effort moves you") for line in lines)


def test_plain_lines_elsewhere(tiny_run, caplog):
    with caplog.at_level(logging.INFO, logger="src.callbacks.console"):
        run = tiny_run("callbacks.console.every_seconds=0", "trainer.max_steps=3", "logger=csv")
    lines = [message for message in caplog.messages if re.match(r"step \d/3: loss", message)]
    assert re.match(
        r"step 2/3: loss \d+\.\d{3}, perplexity [\d,.]+, lr \d\.\d\de-\d\d, [\d,]+ tokens/s, 0:00:0\d left", lines[1]
    )
    assert f"{column(run, 'train/loss')[1]:.3f}" in lines[1]


def test_progress_under_accumulation_is_the_steps_own(tiny_run, caplog):
    with caplog.at_level(logging.INFO, logger="src.callbacks.console"):
        run = tiny_run("callbacks.console.every_seconds=0", "trainer.max_steps=3", "logger=csv",
                       "trainer.accumulate_grad_batches=4", "schedule=constant")  # fmt: skip
    lines = [message for message in caplog.messages if re.match(r"step \d/3: loss \d", message)]
    assert len(lines) == 3
    for line, loss, lr in zip(lines, column(run, "train/loss"), column(run, "lr"), strict=True):
        assert f"loss {loss:.3f}" in line
        assert f"lr {lr:.2e}" in line


def test_speed_is_that_of_training_alone(tiny_run, monkeypatch):
    """Each step takes 0.05 s at least, and the checkpoint after it 0.5 s, which do not count."""
    from src.checkpoint import plugin
    from src.training.module import PretrainingModule

    write, step = plugin.write_sealed, PretrainingModule.training_step
    monkeypatch.setattr(plugin, "write_sealed", lambda *a, **k: (time.sleep(0.5), write(*a, **k)))
    monkeypatch.setattr(PretrainingModule, "training_step", lambda *a: (time.sleep(0.05), step(*a))[1])
    run = tiny_run("trainer.max_steps=6", "checkpoint.every_steps=1", "~callbacks.text_samples", "~callbacks.loss_plot")
    training = run.record["tokens_seen"] / run.record["tokens_per_second"]
    assert training + 6 * 0.5 < run.record["seconds"]
    rates = column(run, "perf/tokens_per_second")
    assert len(rates) == 6
    assert max(rates) < run.record["tokens_seen"] / 6 / 0.05


@pytest.mark.parametrize("wrong", ["prompts=hello", "prompts=['']", "every_n_epochs=0", "sampling.temperature=-1"])
def test_wrong_callback_options_are_refused_before_the_text_is_read(command, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    status, out, err = command("train", f"callbacks.text_samples.{wrong}", "data.path=nowhere", *TINY)
    assert status == 1
    assert f"error: callbacks.text_samples.{wrong.split('=')[0]}=" in out
    assert "Traceback" not in out + err
    assert "nowhere" not in out


def test_profile_shows_where_the_time_goes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("train", "debug=profile", *TINY)
    assert status == 0
    assert "run_training_batch" in out


def test_one_row_per_step(tiny_run):
    run = tiny_run("trainer.max_steps=6", "eval.every_steps=2", "eval.batches=1")
    assert [row["step"] for row in metrics_of(run)] == list(range(7))
    assert [row["step"] for row in metrics_of(run) if "val/loss" in row] == [0, 2, 4, 6]
