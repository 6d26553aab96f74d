"""A run in Weights & Biases and in MLflow, read back by their own means: whole, once, and with the right ending."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import TINY, metrics_of

from src.checkpoint.interruption import Interrupted
from src.cli.overrides import CONF

SHORT = ("trainer.max_steps=6", "eval.every_steps=3", "eval.batches=1")


class Wandb:
    """Reads the ``.wandb`` files of offline runs with ``wandb leet inspect``; those of one id are one run."""

    endings: ClassVar = {"completed": 0, "interrupted": 255, "failed": 1}

    def runs(self, outputs: Path) -> dict[str, dict]:
        runs = defaultdict(
            lambda: {"config": {}, "metrics": defaultdict(list), "texts": [], "images": defaultdict(list)}
        )
        for file in sorted(outputs.rglob("offline-run-*/*.wandb")):
            done = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", file],
                                  capture_output=True, text=True, check=True)  # fmt: skip
            self.add(runs[file.stem.removeprefix("run-")], file, map(json.loads, done.stdout.splitlines()))
        return dict(runs)

    def add(self, run: dict, file: Path, records) -> None:
        for record in records:
            if record["type"] == "run":
                run |= {"project": record["run"]["project"], "name": record["run"]["display_name"]}
            elif record["type"] == "config":
                run["config"] |= record["config"]["update"]
            elif record["type"] == "exit":
                run["ending"] = record["exit"].get("exit_code", 0)
            elif record["type"] == "history":
                self.add_row(run, file.parent / "files", record["history"]["item"])

    def add_row(self, run: dict, files: Path, row: dict) -> None:
        step = row["trainer/global_step"]
        for key, value in row.items():
            if key == "samples.path":
                run["texts"].append((step, json.loads((files / value).read_text())["data"][0][0]))
            elif key.startswith("plots/") and key.endswith(".filenames"):
                run["images"][key.removesuffix(".filenames")] += [(step, (files / name).read_bytes()) for name in value]
            elif not key.startswith(("samples", "plots/", "_", "trainer/")):
                run["metrics"][key].append((step, value))


class Mlflow:
    """Reads the store with MLflow's own client."""

    endings: ClassVar = {"completed": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

    def runs(self, outputs: Path) -> dict[str, dict]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
        projects = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
        return {run.info.run_id: self.read(client, run, projects) for run in client.search_runs([*projects])}

    def read(self, client, run, projects: dict) -> dict:
        found = {"project": projects[run.info.experiment_id], "name": run.info.run_name, "ending": run.info.status}
        found |= {"config": run.data.params, "tags": run.data.tags, "texts": [], "images": defaultdict(list)}
        found["metrics"] = {
            key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        for artifact in client.list_artifacts(run.info.run_id, "samples"):
            text = Path(client.download_artifacts(run.info.run_id, artifact.path)).read_text()
            found["texts"].append((int(Path(artifact.path).stem), text))
        for artifact in client.list_artifacts(run.info.run_id, "images"):
            if match := re.fullmatch(r"images/(plots~\w+)\+step\+(\d+)\+.*\.png", artifact.path):
                content = Path(client.download_artifacts(run.info.run_id, artifact.path)).read_bytes()
                found["images"][match[1].replace("~", "/")].append((int(match[2]), content))
        return found


@pytest.fixture(params=["wandb", "mlflow"])
def tracker(request, tmp_path, monkeypatch):
    pytest.importorskip(request.param)
    if request.param == "mlflow":
        pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    reader = Wandb() if request.param == "wandb" else Mlflow()
    reader.name = request.param
    return reader


def fail(module):
    raise OSError("broken")


def test_interrupted_moved_and_resumed_it_is_one_run(tracker, tiny_run, at_batch, tmp_path):
    first, moved = tmp_path / "outputs" / "gpt2" / "run", tmp_path / "outputs" / "gpt2" / "moved"
    at_batch(3, lambda module: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tiny_run(*SHORT, f"logger={tracker.name}", folder=first)
    (run,) = tracker.runs(tmp_path / "outputs").values()
    assert run["ending"] == tracker.endings["interrupted"]
    first.rename(moved)
    done = tiny_run(*SHORT, f"logger={tracker.name}", "optimizer.learning_rate=5e-4", resume=moved)
    (run,) = tracker.runs(tmp_path / "outputs").values()

    assert (run["project"], run["ending"]) == ("gpt2", tracker.endings["completed"])
    assert str(run["config"]["data.batch_size"]) == "2"
    assert str(run["config"]["trainer.max_steps"]) == "6"
    assert "0.0005" in str(run.get("tags", run["config"]))  # MLflow's parameters cannot change
    rows = metrics_of(done)
    assert [row["step"] for row in rows] == [*range(7)]
    for key in set().union(*rows) - {"step", "perf/seconds"}:  # which evaluations log again
        assert set(run["metrics"][key]) == {(row["step"], row[key]) for row in rows if key in row}, key
    assert [step for step, _ in sorted(run["texts"])] == [0, 3, 6]
    assert "".join(f"{text}\n\n" for _, text in sorted(run["texts"])) == (moved / "samples.md").read_text()
    assert set(run["images"]) == {"plots/loss", "plots/perplexity"}
    for images in run["images"].values():
        assert images[-1][0] == 6
        assert all(content.startswith(b"\x89PNG") for _, content in images)


def test_each_run_of_a_process_is_tracked_as_its_own(tracker, tiny_run, at_batch, tmp_path):
    """As the jobs of a sweep; the second fails after a step, the third before any and leaves nothing in its folder."""
    folders = [tmp_path / "outputs" / "sweep" / name for name in "012"]
    options = (*SHORT, f"logger={tracker.name}", "name=ours", "callbacks=none")
    tiny_run(*options, folder=folders[0])
    for batch, folder in (2, folders[1]), (0, folders[2]):
        at_batch(batch, fail)
        with pytest.raises(OSError, match="broken"):
            tiny_run(*options, folder=folder)
    assert [folder.is_dir() for folder in folders] == [True, True, False]
    tiny_run(*options, "dry_run=true", folder=folders[2])
    assert not folders[2].exists()
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "text.txt"}
    runs = {run["name"]: run for run in tracker.runs(tmp_path / "outputs").values()}
    assert {run["project"] for run in runs.values()} == {"ours"}
    endings: ClassVar = {name: run["ending"] for name, run in runs.items()}
    kept = {"sweep/0": "completed", "sweep/1": "failed"} | ({} if tracker.name == "wandb" else {"sweep/2": "failed"})
    assert endings == {name: tracker.endings[status] for name, status in kept.items()}
    assert len(runs["sweep/0"]["metrics"]["train/loss"]) == 6


@pytest.mark.slow
def test_two_ranks_are_one_run(tracker, text, tmp_path):
    ranks = ("trainer.devices=2", "trainer.accelerator=cpu", f"data.path={text}", "callbacks=none")
    done = subprocess.run(
        [sys.executable, "-m", "src.train", *TINY, *SHORT, *ranks, f"logger={tracker.name}"],
        env={**os.environ, "PYTHONPATH": str(CONF.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = tracker.runs(tmp_path / "outputs").values()
    assert run["ending"] == tracker.endings["completed"]
    assert len(run["metrics"]["train/loss"]) == 6


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_without_the_package(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"lightning.pytorch.loggers.{name}._{name.upper()}_AVAILABLE", False)
    status, out, _ = command("train", *TINY, f"logger={name}")
    install = f'pip install -e ".[{name}]"'
    assert (status, out) == (1, f"error: logger={name} needs a package that is not installed; use {install}\n")
    assert not [*tmp_path.glob("outputs/*/*")]


@pytest.mark.slow
def test_without_a_login(tmp_path):
    pytest.importorskip("wandb")
    done = subprocess.run(
        [sys.executable, "-m", "src.train", *TINY, *SHORT, "logger=wandb"], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CONF.parent), "HOME": str(tmp_path), "WANDB_MODE": "online"},
    )  # fmt: skip
    assert done.returncode == 1
    line = done.stdout.splitlines()[-1]
    assert re.fullmatch("error: logger=wandb fails: .*; use wandb login, or WANDB_MODE=offline .*", line)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_a_run_that_its_store_does_not_have(tracker, tiny_run, tmp_path, monkeypatch):
    options = ("logger=mlflow", "callbacks=none", "schedule.on_resume=stretch")
    run = tiny_run(*options, "trainer.max_steps=1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(ValueError, match=r"^logger=mlflow fails: .* not found; use MLFLOW_TRACKING_URI="):
        tiny_run(*options, "trainer.max_steps=2", resume=run.folder)
