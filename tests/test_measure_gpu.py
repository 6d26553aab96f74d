"""The measurements on a GPU can be made: their overrides are right, and all of them run at toy size on a CPU."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import measure_gpu
import pytest
from measure_gpu import Measurement, measure, measurements

from src.cli import overrides as cli

DOORS = {"losses": "train", "trainer": "train", "loop": "train", "resume": "train", "benchmark": "benchmark"}
SIZES = pytest.mark.parametrize("dry", [False, True], ids=["full", "toy"])


@pytest.mark.parametrize(
    ("door", "overrides"),
    {
        (DOORS[one.act.__name__], one.arguments): None
        for dry in (False, True)
        for one in measurements(dry)
        if one.act.__name__ in DOORS
    },
)
def test_overrides_have_no_problem(door, overrides):
    if "transformers" in overrides:
        pytest.importorskip("transformers")
    check = importlib.import_module(f"src.{door}").check
    assert cli.find_problems(door, shlex.split(overrides), check) == []


@SIZES
def test_names_are_unique_and_the_tests_exist(dry):
    names = [one.name for one in measurements(dry)]
    assert len(set(names)) == len(names)
    files = [name for one in measurements(dry) if one.act is measure_gpu.tests for name in one.arguments.split()]
    assert "gpu" in files
    assert not [name for name in files if not Path(__file__).with_name(f"test_{name}.py").exists()]


@pytest.mark.parametrize(
    ("limit", "reason"), [(60, "FAILED, exit status 1: ValueError"), (0, "FAILED, stopped after 0 s")]
)
def test_a_failure_is_one_row(tmp_path, limit, reason):
    ((name, measured, expected),), *_ = measure(
        Measurement("", "unknown", "a rate", measure_gpu.device), tmp_path, limit
    )
    assert (name, expected) == ("unknown", "a rate")
    assert measured.startswith(reason)


@pytest.mark.slow
def test_one_of_each_kind_at_toy_size(tmp_path):
    """``DRY=1 python tests/measure_gpu.py`` makes all of them."""
    chosen = ["device", "machine", "three steps, optimizer=muon", "loop", "experiment=gpt2_124m", "generation, float32"]
    environment = {**os.environ, "DRY": "1", "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, measure_gpu.__file__, *chosen]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[4:]]
    assert {len(row) for row in rows} == {5}
    measured = {row[0]: row[1] for row in rows}
    assert not [one for one in chosen if not any(name.split(": ")[0] == one for name in measured)]
    assert not [row for row in rows if row[1].startswith(("FAILED", "not run")) or "failed" in row[1]]
    assert "| loop | " in table and "tests/measure_gpu.py loop" in table
