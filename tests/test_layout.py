"""The house stands as drawn: imports go down only, and the README's tree is the disk's."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from src.cli.overrides import CONF

ROOT = CONF.parent
README = (ROOT / "README.md").read_text()

# room: the rooms it may import from (itself included)
ALLOWED = {
    "files": {"files"},
    "model": {"model"},
    "tokenizer": {"tokenizer"},
    "figure": {"figure"},
    "data": {"files", "data", "tokenizer"},
    "generation": {"generation", "model", "tokenizer"},
    "interop": {"files", "interop", "model", "training"},
    "bench": {"files", "bench", "data", "generation", "model", "tokenizer", "training"},
    "evaluation": {"files", "evaluation", "figure", "generation", "model", "tokenizer"},
    "training": {"files", "training", "generation", "model", "tokenizer"},
    "callbacks": {"files", "callbacks", "figure", "training", "generation", "model", "tokenizer"},
}
ENTRIES = {
    "train",
    "generate",
    "evaluate",
    "export",
    "prepare",
    "verify_resume",
    "benchmark",
    "cli",
    "streams",
    "help",
    "record",
    "report",
    "resume",
    "continuation",
    "sweep",
    "trainer",
    "processes",
    "launch",
}


def tracked(*patterns: str, root: Path = ROOT) -> list[str]:
    """The project's files, those of its folders that are not yet committed included; what else lies in the checkout,
    as the models and shards of a user, is none of them."""

    def listed(*arguments: str) -> list[str]:
        done = subprocess.run(["git", "ls-files", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    committed = listed("--cached")
    folders = [f"{line.split('/')[0]}/" for line in committed if "/" in line]
    new = [line for line in listed("--others", "--exclude-standard") if line.startswith(tuple(folders))]
    chosen = listed("--cached", "--others", "--exclude-standard", *patterns)
    return sorted(line for line in {*committed, *new}.intersection(chosen) if (root / line).exists())


def test_what_a_user_adds_to_the_checkout_is_not_the_projects(tmp_path):
    for name in (
        "README.md",
        "src/old.py",
        "src/new.py",
        "src/new.bin",
        "my_model/config.json",
        "my_shards/a b.bin",
        "mine.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    for arguments in ["init", "-q"], ["add", "README.md", "src/old.py"]:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert tracked(root=tmp_path) == ["README.md", "src/new.bin", "src/new.py", "src/old.py"]
    assert tracked("src/*.py", root=tmp_path) == ["src/new.py", "src/old.py"]


def imports(path: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" if node.module == "src" else node.module for name in node.names}
    return found


def room_of(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


@pytest.mark.parametrize("path", [path for path in tracked("src/*.py") if path != "src/__init__.py"])
def test_imports_go_down_only(path):
    room = room_of(path)
    if room in ENTRIES:
        return  # entries may import everything
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("src.")}
    assert rooms <= ALLOWED[room]
    packages = {name.split(".")[0] for name in imports(path)}
    assert not packages & {"hydra", "omegaconf"}
    if room in ("model", "generation", "tokenizer"):
        assert "lightning" not in packages


def test_nothing_of_pytorch_or_lightning_before_the_overrides_are_checked():
    for path in [*(f"src/{name}.py" for name in ENTRIES), *tracked("src/*/config.py")]:
        tree = ast.parse((ROOT / path).read_text())
        top = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in top} & {"torch", "lightning"}, path


def test_files_can_be_read_in_one_sitting():
    lengths = {path: (ROOT / path).read_text().count("\n") for path in tracked("src/*.py")}
    long = {path: lines for path, lines in lengths.items() if lines > 160}
    assert set(long) <= {
        "src/callbacks/loss_plot.py",  # one figure: steps, evaluations, learning rate and tokens
        "src/generate.py",  # every way for a prompt to come in and for a text to go out
        "src/evaluate.py",  # which text belongs to the weights, what of it is scored, and the figures
        "src/launch.py",  # devices asked for, devices there, and one process for each
        "src/processes.py",  # how processes begin together, agree and fail together
        "src/evaluation/tasks.py",  # two tasks, from the lines of a file to the figures
        "src/resume.py",  # which run is meant, its overrides, and whether they may be trusted
        "src/report.py",  # all that a run says of itself, before, at its end, and when it fails
        "src/train.py",  # the main job from the overrides to the summary, told in one place
        "src/cli.py",  # all that stands between a mistyped override and its one-line answer
        "src/training/config.py",  # five sections of the config with all their limits
        "src/training/module.py",  # one LightningModule
        "src/verify_resume.py",  # a run, its double, its interruptions, and the comparison
        "src/data/datamodule.py",  # the whole path of one batch
        "src/data/windows.py",  # windows, their order, and each rank's part of it
        "src/data/prepare.py",  # from files to shards, and whether a folder may be gone on with
        "src/data/shard_writer.py",  # one writer, and all that a kill may leave behind
        "src/data/tokens.py",  # a corpus as tokens, and the cache of them that processes share
        "src/tokenizer.py",  # text to tokens and back, and where a text can be cut in between
        "src/data/documents.py",  # three formats, two packings, and what can be wrong with them
        "src/benchmark.py",  # three measurements, from the processes to the table
        "src/generation/text.py",  # from prompts to texts: characters, stop strings, and whose draws are whose
        "src/generation/decode.py",  # the decoding loop, and all that its rows may ask for
        "src/training/sealed.py",  # writing, sealing, reading and distrusting one file
    }


def test_readme_tree_matches_the_disk():
    tree = re.search(r"```text\n(.*?)```", README.split("## How it is laid out")[1], re.S)[1]
    drawn, folders = set(), []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        depth = len(indent) // 2
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            drawn.add("/".join(folders))
    assert drawn == {path for path in tracked() if not path.endswith("__init__.py")}


def test_repository_speaks_of_the_project_alone():
    suspicious = re.compile(r"(/root/|/work/|/home/\w|/tmp/dev)")
    for path in tracked():
        if path.endswith((".png", ".tiktoken")):
            continue
        text = (ROOT / path).read_text()
        if path != "tests/test_layout.py":
            assert not suspicious.search(text), path
