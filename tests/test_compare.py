"""``python -m src.compare``: a table and a figure of several runs, sorted by what can be compared."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import column

from src.runs.compare import BITS, LOSS, compared_column, figure_of, read_run, rows_of
from src.runs.tables import in_columns

COMMON = ("callbacks=none", "+callbacks.throughput._target_=src.callbacks.throughput.Throughput",
          "+callbacks.perplexity._target_=src.callbacks.perplexity.Perplexity",
          "logger=csv", "eval.every_steps=4", "eval.batches=2")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their learning rates, ``a`` the better one, and ``b`` with another tokenizer, ``c``."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def three(runs, tiny_run, tmp_path, long_text):
    if not (runs / "a").exists():
        text = runs / "text.txt"
        shutil.copy(long_text, text)
        for name, *overrides in (
            ("a", "tokenizer=gpt2", "optimizer.learning_rate=0.01"),
            ("b", "tokenizer=gpt2"),
            ("c",),
        ):
            tiny_run(*COMMON, f"data.path={text}", *overrides, folder=runs / name)
    shutil.copytree(runs, tmp_path / "three")
    return tmp_path / "three"


def table(output: Path) -> list[dict[str, str]]:
    with (output / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_hold_what_differs_and_what_came_out(command, three, tmp_path):
    output = tmp_path / "out"
    status, out, err = command("compare", str(three / "b"), str(three / "a"), f"output={output}")
    assert (status, err) == (0, "")
    first, second = table(output)
    assert (first["run"], second["run"]) == ("a", "b")  # the lower loss first
    assert (first["optimizer.learning_rate"], second["optimizer.learning_rate"]) == ("0.01", "0.0006")
    assert not {"seed", "model.emb_dim", "device", "parameters", "val_tokens"} & set(first)  # which do not differ
    for row in first, second:
        record = json.loads((three / row["run"] / "run.json").read_text())
        with (three / row["run"] / "metrics.csv").open(newline="") as file:
            evaluated = [point for point in csv.DictReader(file) if point["val/loss"]]
        assert float(row["val_loss"]) == record["val_loss"] == float(evaluated[-1]["val/loss"])
        losses = [float(point["val/loss"]) for point in evaluated]
        assert float(row["best_val_loss"]) == record["best_val_loss"] == min(losses)
        assert float(row["bits_per_byte"]) == float(evaluated[-1]["val/bits_per_byte"])
        assert (row["steps"], row["tokens"]) == (str(record["optimizer_steps"]), str(record["tokens_seen"]))
        assert row["checkpoint"] == str(three / row["run"] / "checkpoints" / "best.ckpt")
    assert "optimizer.learning_rate: 0.01 (a); 0.0006 (b)" in out
    assert (output / "compare.md").read_text().splitlines()[2].startswith("| a | 0.01 | completed | ")
    assert (output / "compare.png").stat().st_size > 20_000


def test_other_tokens_are_compared_by_bits_per_byte(command, three, tmp_path):
    output = tmp_path / "out"
    status, out, _ = command("compare", f"{three}/*", f"output={output}")
    assert status == 0
    rows = table(output)
    assert "bits per byte" in out
    bits = [float(row["best_bits_per_byte"]) for row in rows]
    assert bits == sorted(bits)
    assert [row["run"] for row in rows] != sorted((row["run"] for row in rows), key=lambda name: name != "c")
    assert compared_column([read_run(three / name, name) for name in "ab"]) == LOSS
    assert compared_column([read_run(three / name, name) for name in "abc"]) == BITS


def test_figure_draws_every_evaluation_over_tokens_and_seconds(three):
    runs = [read_run(three / name, name) for name in "ab"]
    of_tokens, of_seconds = figure_of(runs).axes
    for axes, x in (of_tokens, "tokens_seen"), (of_seconds, "perf/seconds"):
        drawn = [list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_marker() == "o"]
        assert drawn == [run.curve(x, LOSS) for run in runs]
        assert [points[0][0] for points in drawn] == [0, 0]  # step 0
        thin = [line for line in axes.lines if line.get_marker() == "None"]
        assert [len(line.get_xdata()) for line in thin] == [len(run.curve(x, "train/loss")) for run in runs]
    for row in runs[0].metrics:
        del row["perf/seconds"]  # as a run from before it was logged
    of_tokens, of_seconds = figure_of(runs).axes
    assert [len([line for line in axes.lines if len(line.get_xdata()) > 1]) for axes in (of_tokens, of_seconds)] == [
        4,
        2,
    ]


def test_seconds_go_on_in_a_resumed_run(tiny_run):
    given = (*COMMON, "checkpoint.every_steps=1", "trainer.max_epochs=-1", "schedule=constant")
    run = tiny_run(*given, "trainer.max_steps=6")
    before = column(run, "perf/seconds")
    assert before == sorted(before)
    assert before[0] == 0
    assert before[-1] == pytest.approx(run.record["tokens_seen"] / run.record["tokens_per_second"], rel=0.01)
    resumed = tiny_run(*given, "trainer.max_steps=9", resume=run.folder)
    after = column(resumed, "perf/seconds")
    assert after[: len(before)] == before
    assert after == sorted(after)
    assert len(after) == len(before) + 3


def test_best_loss_counts_step_0_and_what_was_before_a_resume(tiny_run):
    given = (*COMMON, "optimizer.learning_rate=0.5", "schedule=constant", "trainer.max_epochs=-1")
    run = tiny_run(*given, "trainer.max_steps=4")
    losses = column(run, "val/loss")
    assert run.record["best_val_loss"] == losses[0] == min(losses)
    resumed = tiny_run(*given, "trainer.max_steps=6", resume=run.folder)
    assert resumed.record["best_val_loss"] == losses[0]
    assert resumed.record["val_loss"] != losses[0]


@pytest.mark.parametrize(
    ("record", "metrics"),
    [
        ("", None),
        ("[", b""),
        ("[1]", b"\x00\xff,\n1,2,3\n"),
        ('{"status": 3, "config": [], "val_loss": "low"}', b'step,val/loss,tokens_seen\n0,nan,1\n1,2,"'),
        ('{"val_loss": 1e999, "parameters": ' + "9" * 400 + ', "git": {}, "device": [1]}', b"step\nx,y\n"),
        ('{"status": "\\u001b[31m", "config": {"a": {"b": [{}]}}, "best_val_loss": null}', None),
    ],
)
def test_damaged_and_foreign_files(command, three, tmp_path, record, metrics):
    odd = three / "odd"
    odd.mkdir()
    (odd / "run.json").write_text(record)
    if metrics is not None:
        (odd / "metrics.csv").write_bytes(metrics)
    status, out, err = command("compare", str(three / "a"), str(odd), f"output={tmp_path / 'out'}")
    assert (status, err) == (0, "")
    assert {row["run"] for row in table(tmp_path / "out")} == {"a", "odd"}
    assert "\x1b" not in out
    assert ("without rows in metrics.csv, so without curves: odd" in out) == (b"nan" not in (metrics or b""))


def test_sweep_is_its_jobs_and_a_killed_run_is_named(command, three, tmp_path):
    sweep = tmp_path / "sweep"
    for number, name in ("10", "a"), ("9", "b"):
        shutil.copytree(three / name, sweep / number)
    record = json.loads((sweep / "9" / "run.json").read_text())
    left = {key: value for key, value in record.items() if "loss" not in key}
    (sweep / "9" / "run.json").write_text(json.dumps({**left, "status": "running"}))
    status, _, _ = command("compare", str(sweep), f"output={tmp_path / 'out'}")
    assert status == 0
    assert [(row["run"], row["status"]) for row in table(tmp_path / "out")] == [("10", "completed"), ("9", "killed")]
    assert float(table(tmp_path / "out")[1]["val_loss"]) == record["val_loss"]  # of its last evaluation


@pytest.mark.parametrize("columns", [80, 120])
def test_table_fits_the_terminal(three, columns):
    """In blocks, each with the names of the runs; every column is in one of them."""
    rows = rows_of([read_run(three / name, name) for name in "abc"])
    lines = in_columns(rows, columns)
    widest = max(len(str(row["checkpoint"])) for row in rows) + len("run  ")
    assert max(map(len, lines)) <= max(columns, widest)
    blocks = "\n".join(lines).strip().split("\n\n")
    assert [line.split()[0] for block in blocks for line in block.splitlines()] == ["run", *"abc"] * len(blocks)
    assert sorted(name for block in blocks for name in block.split("\n")[0].split()[1:]) == sorted({*rows[0]} - {"run"})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "runs is needed; use python -m src.compare <run folder>"),
        (["nowhere"], "runs=nowhere is no run"),
        (["latest"], "runs=latest finds no run in"),
        (["nowhere", "output=text.txt/x"], "output=text.txt/x cannot be made"),
        (["nowhere", "ouput=x"], "ouput is not a key of compare: did you mean output?"),
    ],
)
def test_wrong_arguments_are_one_line_each(command, tmp_path, text, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    status, out, err = command("compare", *arguments)
    assert (status, out) == (1, "")
    assert re.search(f"^error: {re.escape(reason)}", err, re.M)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [text]


def test_rows_of_runs_with_odd_names(three):
    odd = three / "lr=0.1, |x|"
    shutil.copytree(three / "a", odd)
    assert rows_of([read_run(odd, odd.name), read_run(three / "b", "b")])[0]["run"] == odd.name
