"""What ``weights=`` names, from the file system alone."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from src.checkpoint.pickles import is_checkpoint, is_in_parts
from src.files import expanded

# Repositories of the Hugging Face hub, each pinned to a commit.
HUB = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
WEIGHTS_FILE, BOOK_FILE = "weights.pt", "model.pth"
LARGEST_JSON = 2**24  # bytes; the index of a thousand shards has a few MB
HUGGINGFACE_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class Source(NamedTuple):
    """``kind``: ``file``, ``run``, ``huggingface``, ``openai`` or ``hub``. ``path``: the file, folder, prefix or
    name."""

    kind: str
    path: Path


def locate(weights: str, key: str = "weights") -> Source:
    """Where ``weights`` are, and of which kind. ``key`` is the override that named them.

    Raises:
        ValueError: there is nothing, a folder without weights, or an unknown name.
    """
    if not weights:
        raise ValueError(f"{key} is empty; use {key}=<run folder> or {key}=gpt2")
    path = expanded(weights)
    try:
        if is_checkpoint(path):
            return Source("openai", path.with_suffix("")) if path.suffix == ".index" else Source("file", path)
        if path.is_dir():
            return _folder(path, key)
        if path.name and path.with_name(f"{path.name}.index").is_file():  # TensorFlow names a checkpoint by a prefix
            return Source("openai", path)
    except OSError as error:
        raise ValueError(f"{key}={weights} cannot be read ({error.strerror}); use {key}=<a readable file>") from None
    name = weights.removeprefix("openai-community/")
    if name in HUB:
        return Source("hub", Path(name))
    raise ValueError(
        f"{key}={weights} is not a file or folder (seen from {Path.cwd()}) and none of {', '.join(HUB)}; "
        f"use {key}=<run folder> or {key}=gpt2"
    )


def run_folder(weights: str) -> Path | None:
    """The folder, with a ``run.json``, of the run that wrote ``weights``, which name it or a checkpoint in it; None if
    they do not belong to a run."""
    path = expanded(weights).absolute()
    try:
        folder = path if path.is_dir() and not is_in_parts(path) else path.parent
        folder = folder.parent if folder.name == "checkpoints" else folder
        return folder if path.exists() and (folder / "run.json").is_file() else None
    except OSError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ValueError: the file is missing, too large, not JSON, or not an object.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path.name}")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON / 1e6:.0f} MB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"its {path.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {path.name} is not JSON ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"its {path.name} does not hold a JSON object")
    return content


def _folder(path: Path, key: str) -> Source:
    if (path / "checkpoints").is_dir() or any(path.glob("*.ckpt")):
        return Source("run", path)
    if any((path / name).is_file() for name in HUGGINGFACE_FILES):
        if not (path / "config.json").is_file():
            raise ValueError(f"{key}={path} has weights but no config.json with their shape; put it beside them")
        return Source("huggingface", path)
    if any(path.glob("*.index")):
        if not (path / "hparams.json").is_file():
            raise ValueError(f"{key}={path} has a checkpoint but no hparams.json; put OpenAI's beside it")
        return Source("openai", path)
    for name in WEIGHTS_FILE, BOOK_FILE, "model_and_optimizer.pth":
        if (path / name).is_file():
            return Source("file", path / name)
    if jobs := sorted(job.parent.name for job in path.glob("*/checkpoints")):
        raise ValueError(f"{key}={path} is a sweep of several runs; use {key}={path / jobs[0]}")
    inside = [file.parent for file in (*path.glob("*/config.json"), *path.glob("*/hparams.json"))]
    raise ValueError(
        f"{key}={path} is a folder without weights, such as checkpoints/, model.safetensors, model.ckpt.index or "
        f"{BOOK_FILE}; use {key}={inside[0] if inside else '<a folder that has them>'}"
    )
