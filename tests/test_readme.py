"""Every command that the README shows composes, and the figures of its tables come from commands that it shows."""

import functools
import importlib.util
import json
import re
import shlex
import sys

import pytest
from conftest import TINY, story_of

from src import benchmark, evaluate, export, generate, prepare, verify_resume
from src.cli import overrides as cli
from src.cli.latest import with_latest_weights
from src.cli.resume import resumed_overrides
from src.train import find_problems

README = (cli.CONF.parent / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
CHECKS = {
    "train": find_problems,
    "verify_resume": verify_resume.find_problems,
    "generate": generate.find_problems,
    "evaluate": evaluate.find_problems,
    "export": export.find_problems,
    "prepare": prepare.find_problems,
    "benchmark": benchmark.find_problems,
}
REWRITES = {
    "train": resumed_overrides,
    "generate": with_latest_weights,
    "evaluate": evaluate.with_data_of_run,
    "export": with_latest_weights,
}
OWN = [re.search(r"-m src\.(\w+)(.*)", command).groups() for command in COMMANDS if "-m src." in command]


def test_two_set_up_commands_are_one_line_each():
    main, test = (line for line in COMMANDS if "-m venv" in line)
    assert main.endswith("python -m src.train model=gpt2_small trainer.max_epochs=10")
    assert test.endswith("pytest -n 2")
    assert BLOCKS[0].count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_no_shell_reads_a_pattern_in_a_command(command):
    """zsh refuses a pattern that matches no file."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|\\.|(^|\s)#.*", " ", command)
    assert not set(bare) & set("[]*?~^")
    assert not re.search(r"\s=", bare)


@pytest.mark.parametrize(("name", "arguments"), OWN)
def test_commands_compose(name, arguments, tmp_path, monkeypatch):
    file = tmp_path / "given.txt"
    file.write_text("text")
    overrides = shlex.split(arguments, comments=True)
    check = CHECKS[name]
    if name == "generate":
        overrides, raw = app.take_out(overrides, generate.RAW)
        raw["prompt_file"] = [str(file) for _ in raw["prompt_file"]]
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        check = functools.partial(check, raw=raw)
    if importlib.util.find_spec("litgpt") is None:
        overrides = [override for override in overrides if not override.startswith("peers=")]
    overrides = [
        override if override.startswith("output=") else re.sub(r"=(outputs|my|path)\S*$", f"={file}", override)
        for override in overrides
    ]
    if importlib.util.find_spec("submitit") is None:
        overrides = [override for override in overrides if not re.match(r"hydra[./]launcher", override)]
    if "trainer.num_nodes=2" in overrides:  # as torchrun tells each of its processes
        for key, value in ("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "16"):
            monkeypatch.setenv(key, value)
    (tmp_path / "outputs" / "gpt2" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "outputs" / "gpt2" / "run" / "checkpoints" / "last.ckpt").touch()
    record = {"status": "completed", "overrides": [], "config": {"data": {"path": None}}}
    (tmp_path / "outputs" / "gpt2" / "run" / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    overrides = REWRITES.get(name, list)(overrides)
    assert cli.find_problems(name, overrides, check) == []


def test_commands_for_the_latest_run_work_on_a_tiny_one(command, text, tmp_path, monkeypatch):
    """All but those that want a run which was interrupted, or GPT-2's weights."""
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "data=text", f"data.path={text}", "data.batch_size=25", "trainer.max_epochs=3"]
    assert command("train", *tiny, "callbacks=none")[0] == 0
    commands = [(name, shlex.split(arguments)) for name, arguments in OWN]
    commands = [(name, given) for name, given in commands if "latest" in " ".join(given) and given != ["resume=latest"]]
    commands = [(name, given) for name, given in commands if "gpt2" not in " ".join(given)]
    assert len(commands) == 8
    for name, given in commands:
        short = (
            ["trainer.max_steps=2", "callbacks=none", "eval.max_tokens=512"]
            if name == "train" and "weights=latest" in given
            else []
        )
        status, out, err = command(name, *given, *short)
        assert status == 0, f"{name} {given}: {out} {err}"


@pytest.mark.parametrize(
    ("command", "least"), [("train", 20), ("generate", 12), ("evaluate", 5), ("benchmark", 6), ("prepare", 5)]
)
def test_config_tables_name_keys_that_exist(command, least):
    section = README.split("## Configuration")[1].split("\n## ")[0]
    tables = dict(
        zip(
            ["train", "generate", "evaluate", "benchmark", "prepare"],
            section.split("Those of `python -m src."),
            strict=True,
        )
    )
    keys = cli.keys_of(cli.compose(command, ["weights=x"] if command in ("generate", "evaluate") else []))
    named = [
        key for cell in re.findall(r"^\| (`[^|]*) \|", tables[command], re.M) for key in re.findall("`(.*?)`", cell)
    ]
    assert len(named) > least
    assert set(named) <= keys


def test_python_in_the_readme_runs(tmp_path, monkeypatch, small_weights):
    """The section on Python, as written, with a text and weights at hand."""
    section = README.split("## In Python")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text.txt").write_text(story_of(400))
    (tmp_path / "my_model").symlink_to(small_weights.parent)
    for block in blocks:
        exec(block, {})
