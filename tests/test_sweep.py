"""A sweep keeps a table of its jobs whatever becomes of them, and runs what is left of it when it is continued."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from src.cli.sweep import SweepTable, resumed_sweep
from src.runs.record import read_record

SMALL = (
    "model=gpt2_tiny", "model.context_length=16", "tokenizer=byte", "callbacks=none", "logger=csv",
    "trainer.max_steps=6", "eval.every_steps=2", "eval.batches=1", "checkpoint.every_steps=1",
    "trainer.accelerator=cpu", "trainer.precision=32-true",
)  # fmt: skip
TROUBLE = """
import os, signal
from pathlib import Path
import torch
from lightning.pytorch import Callback
class Trouble(Callback):
    def __init__(self, kind):
        self.kind = kind
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not Path("trouble").exists() or trainer.global_step < 3 * (self.kind == "killed"):
            return
        if self.kind == "hungry":
            torch.empty(2**50, dtype=torch.uint8)  # more than PyTorch can allocate
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "waits":
            Path("waiting").touch()
            signal.pause()
    def on_train_start(self, trainer, pl_module):
        if self.kind == "fails":
            raise RuntimeError("as always")
"""
TROUBLESOME = ("+callbacks.trouble._target_=trouble.Trouble",)


@pytest.fixture
def started(tmp_path, spawned):
    """Starts ``python -m src.train -m`` in ``tmp_path``, where a callback of Trouble can be found."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    (tmp_path / "trouble").touch()
    return lambda *arguments: spawned("-m", "src.train", "-m", *arguments)


def rows_of(sweep: Path) -> dict[str, dict[str, str]]:
    with (sweep / "sweep.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def content(job: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in job.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_failed_killed_and_out_of_memory_then_continued(started, tmp_path):
    sweep = tmp_path / "sweep"
    kinds = ["fine", "fails", "hungry", "killed", "good", "well"]
    first = started(*SMALL, *TROUBLESOME, f"+callbacks.trouble.kind={','.join(kinds)}", "hydra.sweep.dir=sweep")
    out, err = first.communicate()
    assert first.returncode == 1, err
    assert "error: the process was killed by SIGKILL" in err
    rows = rows_of(sweep)
    assert [rows[str(at)]["callbacks.trouble.kind"] for at in range(6)] == kinds
    assert [rows[str(at)]["status"] for at in range(6)] == [
        "completed", "failed", "oom", "failed", "completed", "completed",
    ]  # fmt: skip
    assert {"seed", "trainer.max_steps", "tokenizer"}.isdisjoint(rows["0"])  # which do not differ
    assert rows["3"]["steps"] == "3"  # of its last row
    assert rows["0"]["checkpoint"] == "sweep/0/checkpoints/best.ckpt"
    assert (rows["0"]["steps"], rows["0"]["tokens"]) == ("6", str(6 * 2 * 16))
    assert (sweep / "plots" / "sweep.png").stat().st_size > 10_000
    assert (sweep / "sweep.md").read_text().count("\n") == 2 + 6
    assert sorted(line.split()[1:3] for line in out.splitlines()[-7:-1]) == sorted(
        [row["status"], number] for number, row in rows.items()
    )
    before = {number: content(sweep / number) for number in "045"}
    (tmp_path / "trouble").unlink()

    again = started("sweep.resume=sweep")
    out, err = again.communicate()
    assert again.returncode == 1, err  # one fails again
    rows = rows_of(sweep)
    assert [rows[str(at)]["status"] for at in range(6)] == ["completed", "failed", *["completed"] * 4]
    assert {number: content(sweep / number) for number in "045"} == before
    assert [read_record(sweep / number).get("resumed_at") for number in "23"] == [[0], [2]]
    for number in "23":  # as the others, though one was started again and the other continued
        assert rows[number]["val_loss"] == rows["0"]["val_loss"]
        assert (sweep / number / "metrics.csv").read_text().count("\n") == 8


@pytest.mark.slow
def test_interrupted_between_jobs_and_continued_with_another_override(started, tmp_path):
    process = started(*SMALL, *TROUBLESOME, "+callbacks.trouble.kind=waits", "seed=1,2,3", "hydra.sweep.dir=my sweep")
    deadline = time.monotonic() + 120
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = started("sweep.resume=my sweep")
    _, err = second.communicate()
    assert second.returncode == 1
    assert "my sweep is in use by another process" in err
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "to continue the sweep: python -m src.train -m 'sweep.resume=" in err
    assert list(rows_of(tmp_path / "my sweep")) == ["0"]
    (tmp_path / "trouble").unlink()
    again = started("sweep.resume=my sweep", "eval.every_steps=3")
    _, err = again.communicate()
    assert again.returncode == 0, err
    rows = rows_of(tmp_path / "my sweep")
    assert {(number, row["seed"], row["status"]) for number, row in rows.items()} == {
        (str(number), str(number + 1), "completed") for number in range(3)
    }
    assert all(read_record(tmp_path / "my sweep" / number)["config"]["eval"]["every_steps"] == 3 for number in "012")


@pytest.fixture
def sweep_of(tmp_path, monkeypatch):
    """The folder of a sweep with some overrides, as a sweep records it when it starts."""
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)

    def made(*overrides: str, name: str = "sweep") -> Path:
        hydra = {"overrides": {"task": list(overrides), "hydra": ["hydra.mode=MULTIRUN"]}, "sweep": {"dir": name}}
        SweepTable().on_multirun_start(OmegaConf.create({"hydra": hydra}))
        return Path(name)

    return made


def test_continued_by_its_own_overrides(sweep_of):
    folder = sweep_of("seed=1,2", "optimizer=adamw,muon")
    own = [f"sweep.resume='{folder}'", f"hydra.sweep.dir='{folder}'", "hydra.output_subdir=null"]
    assert resumed_sweep(["-m", f"sweep.resume={folder}"]) == ["-m", "seed=1,2", "optimizer=adamw,muon", *own]
    given = ["-m", "optimizer=adamw,muon", f"sweep.resume={folder}", "eval.batches=1"]  # in any order
    assert resumed_sweep(given) == ["-m", "seed=1,2", "optimizer=adamw,muon", "eval.batches=1", *own]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sweep.resume=sweep"], "continues a sweep; use -m sweep.resume=sweep"),
        (["-m", "sweep.resume=nowhere"], "sweep.resume=nowhere is not the folder of a sweep"),
        (["-m", "sweep.resume=sweep", "seed=3"], "seed=3 would change the jobs of the sweep"),
        (["-m", "sweep.resume=sweep", "eval.batches=1,2"], "eval.batches=1,2 would change the jobs"),
        (["-m", "sweep.resume=sweep", "hydra.sweep.dir=x"], "hydra.sweep.dir=x would change the jobs"),
        (["-m", "sweep.resume=sweep", "hydra/sweeper=optuna"], "was made with hydra/sweeper=optuna"),
    ],
)
def test_what_cannot_be_continued_is_one_line(sweep_of, arguments, reason):
    sweep_of("seed=1,2")
    with pytest.raises(ValueError) as error:
        resumed_sweep(arguments)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_typing_errors_are_found(command, sweep_of):
    folder = sweep_of("seed=1,2")
    status, _, err = command("train", "-m", f"sweep.resum={folder}")
    assert (status, err) == (
        1,
        "error: sweep.resum is not a key of train: did you mean sweep.resume? (all: --cfg job)\n",
    )


def test_foreign_overrides_have_to_be_typed_again(sweep_of):
    folder = sweep_of("seed=1,2", "+callbacks.x._target_=os.system")
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**record, "signature": "0" * 64}))
    with pytest.raises(ValueError, match="has overrides of another user"):
        resumed_sweep(["-m", f"sweep.resume={folder}"])
    assert resumed_sweep(["-m", *record["overrides"], f"sweep.resume={folder}"])[1:3] == record["overrides"]


def test_one_process_at_a_time(sweep_of, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    with FileLock(tmp_path / "taken" / ".lock"), pytest.raises(SystemExit):
        sweep_of("seed=1,2", name="taken")
    assert "error: taken is in use by another process" in capsys.readouterr().err
