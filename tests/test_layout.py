"""The rooms of src/: imports go down only, files are short, and the README's map is true."""

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from src.cli.overrides import CONF

ROOT = CONF.parent
README = (ROOT / "README.md").read_text()

# A file imports from its own room and from those of lower levels only. "__init__" is src/__init__.py.
LEVELS = [
    {"memory"},
    {"__init__", "files", "tokenizer", "device", "config"},
    {"model"},
    {"kernels"},
    {"data", "generation"},
    {"checkpoint"},
    {"interop", "evaluation", "training"},
    {"callbacks"},
    {"runs", "bench"},
    {"cli"},
    {"train", "generate", "evaluate", "export", "prepare", "benchmark", "compare"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
DOORS = LEVELS[-1]
WITHOUT_LIGHTNING = {*LEVELS[0], "model", "kernels", "generation"}


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


def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """What import statements among ``nodes`` name: ``src.files``, ``src.files.write_json``, ``torch``."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{name.name}" for name in node.names}
    return found


def file_of(name: str) -> str | None:
    """The file that an import of ``name`` reads, if it is one of ours."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = "/".join(parts[:count])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in SOURCES:
                return file
    return None


def room_of(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


SOURCES = tracked("src/*.py")
# Function-level and TYPE_CHECKING imports included:
IMPORTS = {path: imports(ast.walk(parse(path))) for path in SOURCES}


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in SOURCES} <= set(LEVEL_OF)


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_down_only(path):
    assert not [name for name in IMPORTS[path] if name.startswith(".")], "relative"
    room, own = room_of(path), [file_of(name) for name in IMPORTS[path] if name.startswith("src.")]
    assert None not in own
    wrong = {file for file in own if room_of(file) != room and LEVEL_OF[room_of(file)] >= LEVEL_OF[room]}
    assert not wrong
    if room != "cli" and room not in DOORS:
        assert not packages(IMPORTS[path]) & {"hydra", "omegaconf"}
    if room in WITHOUT_LIGHTNING:
        assert "lightning" not in packages(IMPORTS[path])


def test_no_file_imports_itself_through_others():
    graph = {path: {file_of(name) for name in names} - {None, path} for path, names in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if room_of(path) in {*DOORS, "cli", "config"} or path.endswith("/config.py")]
)
def test_no_pytorch_or_lightning_before_the_overrides_are_checked(path):
    """Neither at the top of the file, nor of a file that it imports there."""
    seen, pending = set(), [path]
    while pending:
        file = pending.pop()
        seen.add(file)
        names = imports(parse(file).body)
        assert not packages(names) & {"torch", "lightning"}, file
        pending += {file_of(name) for name in names} - {None} - seen


# May only shrink.
LONG = {
    "src/bench/measures.py",  # three measurements, from the processes to the table
    "src/callbacks/plots.py",  # one figure: steps, evaluations, learning rate and tokens
    "src/cli/app.py",  # from the command line to the task, and from errors to one line
    "src/cli/overrides.py",  # all that can be wrong with an override
    "src/data/datamodule.py",  # the whole path of one batch
    "src/data/documents.py",  # three formats, two packings, and what can be wrong with them
    "src/data/prepare.py",  # from files to shards, and from files to facts
    "src/data/shard_writer.py",  # one writer, and all that a kill may leave
    "src/runs/plan.py",  # each line of the plan
    "src/data/shards.py",  # one format, read and checked
    "src/data/windows.py",  # windows, their order, and each rank's part of it
    "src/generate.py",  # every way for a prompt to come in and for a text to go out
    "src/generation/decode.py",  # the decoding loop, and all that its rows may ask for
    "src/generation/text.py",  # from prompts to texts: characters, stop strings, and the draws of each prompt
    "src/runs/record.py",  # the record, the claim to a folder, the signature
    "src/runs/report.py",  # the start card, the summary, and what a failed run says
    "src/runs/start.py",  # three ways to start, and what a checkpoint may be continued with
    "src/training/config.py",  # the Trainer's arguments, and how the sections agree
    "src/training/module.py",  # one LightningModule
}


def test_files_can_be_read_in_one_sitting():
    lengths = {path: (ROOT / path).read_text().count("\n") for path in SOURCES}
    long = {path: lines for path, lines in lengths.items() if lines > 160}
    assert set(long) <= LONG


def test_map_in_the_readme_is_true():
    """What it names inside a folder is what is there, all of it."""
    drawn: dict[str, set[str]] = {}
    folder = ""
    for line in re.search(r"```text\n(.*?)```", README.split("## The map")[1], re.S)[1].splitlines():
        names = re.split("  +", line.strip())[0].split()
        if line.startswith(" "):
            drawn[folder] |= set(names)
        else:
            (folder,) = names
            drawn[folder] = set()
    assert {"src/", "conf/", "tests/"} <= set(drawn)
    for folder, names in drawn.items():
        inside = {re.sub("/.*", "/", path.removeprefix(folder)) for path in tracked(folder)}
        assert inside, folder
        assert not names or names == inside - {"__init__.py", "README.md"}, folder


def test_repository_speaks_of_the_project_alone():
    suspicious = re.compile(r"(/root/|/work/|/home/\w|/tmp/dev)")
    for path in tracked():
        if path.endswith((".png", ".tiktoken")):
            continue
        text = (ROOT / path).read_text()
        if path != "tests/test_layout.py":
            assert not suspicious.search(text), path
