"""A run trained again from its record: what differs is named before, and whether the numbers are the same after."""

import csv
import json
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import TINY

from src.checkpoint.interruption import Interrupted
from src.cli.resume import resumed_overrides
from src.files import write_json
from src.runs import record as records
from src.runs.record import git_revision, read_record
from src.runs.reproduce import code_differences, compare

OPTIONS = ("data.batch_size=4", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2", "model.drop_rate=0.2",
           "eval.every_steps=4", "eval.batches=1", "trainer.precision=32-true", "trainer.accelerator=cpu",
           "~callbacks.loss_plot", "~callbacks.text_samples", "logger=csv")  # fmt: skip


@pytest.fixture
def begun(command, text, tmp_path, monkeypatch) -> Path:
    """The folder of a completed run with accumulation, dropout and shuffling, in two epochs."""
    monkeypatch.chdir(tmp_path)
    assert command("train", *TINY, *OPTIONS, f"data.path={text}")[0] == 0
    return newest()


def newest() -> Path:
    return max(Path("outputs/gpt2").iterdir(), key=lambda folder: folder.name)


def edit(folder: Path, **values) -> None:
    write_json(folder / "run.json", {**read_record(folder), **values})


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(folder: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows_of(folder)]


def test_the_same_run_again_has_the_same_bits(begun, command):
    status, out, _ = command("train", "reproduce=latest")
    again = newest()
    assert status == 0 and again != begun
    assert f"no differences from {begun} in config, code, versions, device and text" in out
    count = sum(bool(value) for row in numbers(begun) for key, value in row.items() if key != "step")
    outcome = f"reproduced {begun}: all {count} values of the {len(rows_of(begun))} rows of metrics.csv are identical"
    assert outcome in out
    assert read_record(again)["reproduces"] == {"run": str(begun), "differences": [], "outcome": outcome}
    assert len(numbers(begun)) > 10
    assert numbers(begun) == numbers(again)


def test_what_was_typed_and_what_has_changed_is_named(begun, command, text):
    versions = read_record(begun)["versions"]
    edit(begun, versions={**versions, "torch": "1.0"}, device="a mainframe", git=None)
    text.write_text("Another bell. " + text.read_text())
    sha256 = read_record(begun)["data_sha256"]
    status, out, _ = command("train", f"reproduce={begun}", "seed=7", "callbacks=none")
    record = read_record(newest())
    assert status == 0
    assert record["reproduces"]["differences"] == [
        "config: seed=7, was 123",
        "config: another callbacks",
        "code: unknown, the run was not made in a repository",
        f"version: torch {versions['torch']}, was 1.0",
        f"device: {record['device']}, was a mainframe",
        f"data_sha256: {record['data_sha256']}, was {sha256}",
    ]
    for difference in record["reproduces"]["differences"]:
        assert f"differs from {begun}: {difference}\n" in out
    first, other = rows_of(begun)[0], rows_of(newest())[0]
    assert other["train/eval_loss"] != first["train/eval_loss"]
    said = f"{begun} is not reproduced: from step 0, train/eval_loss is {other['train/eval_loss']}, was "
    assert record["reproduces"]["outcome"] == said + first["train/eval_loss"]
    assert said in out


def test_the_first_difference_is_named(begun, tmp_path):
    (tmp_path / "other").mkdir()
    rows = rows_of(begun)
    rows[5]["grad_norm"], rows[7]["lr"] = "0.25", "1"
    with (tmp_path / "other" / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    was = rows_of(begun)[5]["grad_norm"]
    said = compare(begun, tmp_path / "other")
    assert said == f"{begun} is not reproduced: from step 5, grad_norm is 0.25, was {was}"


def test_interrupted_and_resumed_runs_and_those_without_metrics_csv(tiny_run, at_batch, tmp_path):
    """An interrupted run is compared up to where it came."""
    options, old = ("callbacks=none", "trainer.max_steps=9", "model.drop_rate=0.2", "logger=csv"), tmp_path / "old"
    at_batch(4, lambda module: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tiny_run(*options, folder=old)
    outcome = tiny_run(*options, f"reproduce={old}").record["reproduces"]["outcome"]
    assert outcome.startswith(f"reproduced {old}: all ") and outcome.endswith(
        " the 6 rows of metrics.csv are identical"
    )
    tiny_run(*options, resume=old)
    outcome = tiny_run(*options, f"reproduce={old}").record["reproduces"]["outcome"]
    assert outcome.startswith(f"reproduced {old}: all ") and outcome.endswith(
        " the 10 rows of metrics.csv are identical"
    )
    (old / "metrics.csv").unlink()
    outcome = tiny_run(*options, f"reproduce={old}").record["reproduces"]["outcome"]
    assert outcome == f"reproduced {old}: all 2 values of the final losses in run.json are identical"
    loss = read_record(old)["val_loss"]
    edit(old, val_loss=loss + 1e-6)
    outcome = tiny_run(*options, f"reproduce={old}").record["reproduces"]["outcome"]
    assert outcome == f"{old} is not reproduced: from step 9, val_loss is {loss}, was {loss + 1e-6}"


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of its own, as if it were that of the project."""
    root = tmp_path / "repository"
    for name in "src/a.py", "src/b.py", "conf/c.yaml":
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    monkeypatch.setattr(records, "ROOT", root)
    git("init", "-q")
    commit()
    return root


def git(*arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *arguments], cwd=records.ROOT, check=True)


def commit() -> None:
    git("add", "-A")
    git("commit", "-qm", "now")


def test_a_changed_line_of_code_is_named(repository, tiny_run):
    options = ("callbacks=none", "trainer.max_steps=1")
    (repository / "src" / "a.py").write_text("changed\n")
    old = tiny_run(*options).folder
    assert "+changed" in (old / "code.diff").read_text()
    assert git_revision().endswith("-dirty")

    def named() -> list[str]:
        return code_differences(read_record(old)["git"], old / "code.diff")

    assert named() == []
    commit()  # the same code, at another revision
    assert named() == []
    assert not (tiny_run(*options).folder / "code.diff").exists()
    (repository / "conf" / "c.yaml").write_text("changed too\n")
    assert named() == ["code: conf/c.yaml"]
    (repository / "src" / "a.py").write_text("changed again\n")
    found = tiny_run(*options, f"reproduce={old}").record["reproduces"]["differences"]
    assert found == ["code: conf/c.yaml", "code: src/a.py"]
    unknown = "0" * 40
    assert code_differences(unknown, old / "code.diff") == [
        f"code: unknown, the revision {unknown} of the run is not in this repository"
    ]
    assert "not made in a repository" in code_differences("--output=stolen", old / "code.diff")[0]


def test_the_code_of_another_user_is_refused(begun, command):
    overrides = [*read_record(begun)["overrides"], "+callbacks.theirs._target_=os.abort"]
    edit(begun, overrides=overrides)
    status, _, err = command("train", f"reproduce={begun}")
    assert status == 1
    assert err == (
        f"error: reproduce={begun} would execute os.abort; type the override that names it again if you trust it\n"
    )


def test_what_cannot_be_reproduced(begun, command, tmp_path):
    status, _, err = command("train", f"reproduce={tmp_path}")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: reproduce={tmp_path} is not a run folder") and "use reproduce=latest" in err
    status, _, err = command("train", f"reproduce={begun}", f"resume={begun}")
    assert (status, err.count("\n")) == (1, 1) and "leave out reproduce" in err
    (begun / "run.json").write_text(json.dumps({"overrides": "all"}))
    assert "damaged run.json" in command("train", f"reproduce={begun}")[2]


def test_a_reproduction_is_itself_reproduced(begun, command):
    assert command("train", f"reproduce={begun}", "seed=7")[0] == 0
    second = newest()
    overrides = resumed_overrides([f"reproduce={second}"])
    assert "seed=7" in overrides
    assert [override for override in overrides if "reproduce" in override] == [f"reproduce='{second}'"]
