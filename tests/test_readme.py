"""Every command in the READMEs composes or runs, their tables name keys that exist, and their examples work."""

import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import TINY, story_of
from omegaconf import OmegaConf

from src.cli import app
from src.cli import overrides as cli
from src.cli.latest import with_latest_weights
from src.cli.sweep import resumed_sweep
from src.runs.record import signature

ROOT = cli.CONF.parent
NAMES = ("README.md", "conf/README.md", "src/README.md", "tests/README.md")
READMES = {name: (ROOT / name).read_text() for name in NAMES}


def door(name: str) -> ModuleType:
    return importlib.import_module(f"src.{name}")


def section(name: str, heading: str) -> str:
    """What stands under ``## heading``."""
    return READMES[name].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def commands_in(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


EXAMPLES = section("src/README.md", "Extending").split("\n### ")[1:]
EXTENDED = [command for example in EXAMPLES for command in commands_in(example)]  # run by test_examples_of_extending
COMMANDS = [line for text in READMES.values() for line in commands_in(text) if line not in EXTENDED]
COMMANDS = list(dict.fromkeys(COMMANDS))
REWRITES = {  # what becomes of a command's overrides before they are composed
    "train": resumed_sweep,
    "generate": with_latest_weights,
    "evaluate": lambda overrides: door("evaluate").with_data_of_run(overrides),
    "export": with_latest_weights,
    "compare": lambda overrides: door("compare").with_runs(overrides),
}
OWN = [re.search(r"-m src\.(\w+)(.*)", command).groups() for command in COMMANDS if "-m src." in command]


def test_two_set_up_commands_are_one_line_each():
    main, test = (line for line in COMMANDS if "-m venv" in line)
    assert main.endswith("python -m src.train model=gpt2_small trainer.max_epochs=10")
    assert test.endswith("pytest -n 2")
    assert re.findall(r"```bash\n(.*?)```", READMES["README.md"], re.S)[0].count("\n") == 1


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
    check = door(name).check
    if name == "generate":
        overrides, raw = app.take_out(overrides, door("generate").RAW)
        raw["prompt_file"] = [str(file) for _ in raw["prompt_file"]]
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        check = functools.partial(check, raw=raw)
    if importlib.util.find_spec("litgpt") is None:
        overrides = [override for override in overrides if not override.startswith("peers=")]
    if importlib.util.find_spec("lm_eval") is None:
        overrides = [override for override in overrides if not override.startswith("tasks=")]
    overrides = [
        override
        if override.startswith("output=")
        else re.sub(r"=(outputs|my(?!_sweep)|path)\S*$", f"={file}", override)
        for override in overrides
    ]
    plugins = ("hydra_submitit_launcher", "hydra_joblib_launcher", "hydra_optuna_sweeper")
    if any(not any(Path(folder, "hydra_plugins", name).exists() for folder in sys.path) for name in plugins):
        overrides = [override for override in overrides if not re.match(r"hydra[./](launcher|sweeper)", override)]
    if "trainer.num_nodes=2" in overrides:  # as torchrun tells each of its processes
        for key, value in ("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "16"):
            monkeypatch.setenv(key, value)
    (tmp_path / "outputs" / "gpt2" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "outputs" / "gpt2" / "run" / "checkpoints" / "last.ckpt").touch()
    record = {"status": "completed", "overrides": [], "config": {"data": {"path": None}}}
    (tmp_path / "outputs" / "gpt2" / "run" / "run.json").write_text(json.dumps(record))
    (tmp_path / "my_sweep").mkdir()
    sweep = {"overrides": ["seed=1,2"], "signature": signature(["seed=1,2"])}
    (tmp_path / "my_sweep" / "sweep.json").write_text(json.dumps(sweep))
    monkeypatch.chdir(tmp_path)
    overrides = REWRITES.get(name, list)(overrides)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    problems = cli.find_problems(name, overrides, check)
    assert [problem for problem in problems if "cannot be fetched while HF_HUB_OFFLINE=1" not in problem] == []


@pytest.mark.slow
def test_commands_for_the_latest_run_work_on_a_tiny_one(command, text, tmp_path, monkeypatch):
    """All but those that want a run which was interrupted, GPT-2's weights, or tasks from the network."""
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "data=text", f"data.path={text}", "data.batch_size=25", "trainer.max_epochs=3"]
    assert command("train", *tiny, "callbacks=none")[0] == 0
    commands = [(name, shlex.split(arguments)) for name, arguments in OWN]
    commands = [(name, given) for name, given in commands if "latest" in " ".join(given) and given != ["resume=latest"]]
    commands = [given for given in commands if not re.search("gpt2|skip_batches|tasks", " ".join(given[1]))]
    assert len(commands) == 11
    for name, given in commands:
        short = (
            ["trainer.max_steps=2", "callbacks=none", "eval.max_tokens=512"]
            if name == "train" and "weights=latest" in given
            else []
        )
        if "ckpt_path=latest" in given:  # of such a short run
            short = ["trainer.max_steps=4"]
        status, out, err = command(name, *given, *short)
        assert status == 0, f"{name} {given}: {out} {err}"


VARIANTS = {
    "train": [[], ["optimizer=muon"], ["schedule=warmup_stable_decay"], ["data=the_verdict"], ["callbacks=ema"]],
    "generate": [["weights=x"]],
    "evaluate": [["weights=x"]],
    "export": [["weights=x", "output=y"]],
    "prepare": [["source=x", "output=y"]],
    "benchmark": [[]],
    "compare": [["runs=[x]"]],
}
# In no table: choices' own names, and what Lightning documents.
UNDOCUMENTED = r"(optimizer|schedule)\.name|trainer\..*|logger\..*|.*\._target_|.*\.format"


def leaves(config: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
    return found


def keys_of(command: str) -> set[str]:
    """Every key that some choice of groups gives ``command`` a value for."""
    composed = (cli.compose(command, overrides) for overrides in VARIANTS[command])
    return set().union(*(leaves(OmegaConf.to_container(cfg, resolve=False)) for cfg in composed))


def names_in(cells: list[str]) -> set[str]:
    """The keys in ``cells``; `` `a.b` `.c` `` names a.b and a.c."""
    found = set()
    for cell in cells:
        names = re.findall("`(.*?)`", cell)
        parent = names[0].rpartition(".")[0] if names else ""
        found |= {parent + name if name.startswith(".") else name for name in names}
    return found


@pytest.mark.parametrize(
    ("command", "heading"),
    [
        ("train", "Training"),
        ("generate", "Generation"),
        ("evaluate", "Evaluation"),
        ("export", "Export"),
        ("prepare", "Preparation"),
        ("benchmark", "Benchmark"),
        ("compare", "Comparison"),
    ],
)
def test_tables_name_every_key_and_no_other(command, heading):
    text, keys = section("conf/README.md", heading), keys_of(command)
    named = names_in(re.findall(r"^\| (`[^|]*) \|", text, re.M))
    unknown = named - keys - {key.rpartition(".")[0] for key in keys}
    assert not unknown
    own = keys if command == "train" else keys - keys_of("train")
    documented = names_in(text.splitlines())
    missing = {key for key in own - documented if not re.fullmatch(UNDOCUMENTED, key)}
    assert not missing


def test_the_most_common_keys_exist():
    keys = keys_of("train")
    named = names_in(re.findall(r"^\| (`[^|]*) \|", section("README.md", "The most common keys"), re.M))
    assert len(named) in (15, 16)
    assert named <= keys | {key.split(".")[0] for key in keys}


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    prose = re.sub(r"```.*?```", "", READMES[name], flags=re.S)
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", prose):
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link


def test_files_on_the_path_of_a_batch_exist():
    table = section("src/README.md", "The path of one batch")
    named = [name for row in re.findall(r"\| ([^|]*) \|$", table, re.M) for name in re.findall("`(.*?)`", row)]
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / "src" / name).exists()]


def test_python_in_the_readme_runs(tmp_path, monkeypatch, small_weights):
    """The section on Python, as written, with a text and weights at hand."""
    blocks = re.findall(r"```python\n(.*?)```", section("src/README.md", "Use from Python"), re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text.txt").write_text(story_of(400))
    (tmp_path / "my_model").symlink_to(small_weights.parent)
    for block in blocks:
        exec(block, {})


def test_table_of_costs_is_what_its_script_prints(capsys):
    text = section("conf/README.md", "Several devices and machines")
    rows = re.findall(r"^\| .*? M \| ([\d,]+), .*, ([\d.]+) \|$", text, re.M)
    (script,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(script, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    rates = [float(line[2].replace(",", "")) for line in printed if line[1] == "1"]
    shares = [line[-1] for line in printed if line[1] == "64"]
    assert [(f"{float(f'{rate:.3g}'):,.0f}", share) for rate, share in zip(rates, shares, strict=True)] == rows
    assert len(rows) == 4


def apply(example: str, root: Path) -> None:
    """Write the files of ``example`` below ``root`` and change what its diffs change."""
    for path, kind, block in re.findall(r"`([\w/.]+)`:\n\n```(python|yaml|diff)\n(.*?)```", example, re.S):
        if kind != "diff":
            assert len(block.splitlines()) <= 20
            (root / path).write_text(block)
            continue
        text = (root / path).read_text()
        for change in block.split("\n\n"):
            lines = change.splitlines()
            old, new = ("\n".join(line[1:] for line in lines if line[0] in f" {sign}") for sign in "-+")
            assert text.count(old) == 1, f"{path}: {old}"
            text = text.replace(old, new)
        (root / path).write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=[example.splitlines()[0] for example in EXAMPLES])
def test_examples_of_extending(example, tmp_path):
    """Applied to a copy of the project, each trains."""
    for folder in "src", "conf":
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "text.txt").write_text(story_of(2000))
    apply(example, tmp_path)
    (given,) = commands_in(example)
    overrides = shlex.split(given)[3:]
    command = [sys.executable, "-m", "src.train", *overrides, "model=gpt2_tiny", "trainer.max_steps=3"]
    command += ["trainer.accelerator=cpu", "hydra.run.dir=run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "completed"
    resumed = subprocess.run(
        [*command[:3], "resume=run", "trainer.max_steps=4", "schedule.on_resume=keep"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    if "weight_norm" in example:
        header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
        assert "weight_norm" in header.split(",")
