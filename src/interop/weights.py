"""``weights=``: a model from any of the sources that hold one, and into a file of our own."""

import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
from torch import Tensor

from src.checkpoint.find import newest_good_checkpoint
from src.checkpoint.parts import WEIGHTS, read_file_or_parts
from src.checkpoint.storage import DamagedError, printable, write_sealed
from src.interop.book import is_book, read_book
from src.interop.hub import fetch
from src.interop.huggingface import read_huggingface
from src.interop.locate import locate
from src.interop.names import assign, empty_model, to_ours
from src.interop.openai import read_openai
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.tokenizer import gpt2_tokenizer
from src.tokenizer.reading import from_file, from_json
from src.tokenizer.table import FILE, to_json

log = logging.getLogger(__name__)

LONGEST_REASON = 500  # characters
_read = functools.partial(read_file_or_parts, unsealed=True, kinds=(WEIGHTS,))


def read_weights(weights: str | Path, key: str = "weights") -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and state dict, in float32, of what ``weights`` names: a checkpoint or folder of a run, a file by
    :func:`save_weights`, a Hugging Face folder, a folder with OpenAI's TensorFlow checkpoint, the book's ``.pth``, or
    gpt2, gpt2-medium, gpt2-large, gpt2-xl. ``key`` is the override that named it, for the messages.

    Of a run folder this is ``best.ckpt``, or the newest checkpoint if that is missing or damaged. Where a checkpoint
    has averaged weights it is these, because its validation loss is theirs.

    Raises:
        ValueError: it is missing, damaged, another model, or cannot be downloaded; one printable line.
    """
    return read_model(weights, key)[:2]


class Model(NamedTuple):
    """A model's config and state dict, its tokenizer, and what a run's checkpoint records of its ``run``: ``step``,
    ``tokens_seen``, ``precision``, ``metrics``, ``data``, ``eval_windows``, ``data_sha256``."""

    config: GPTConfig
    weights: dict[str, Tensor]
    tokenizer: tiktoken.Encoding
    run: dict[str, Any]


def read_model(weights: str | Path, key: str = "weights") -> Model:
    """What :func:`read_weights` reads, with the tokenizer: GPT-2's where the weights bring none."""
    kind, path = locate(str(weights), key)
    if kind == "hub":
        kind, path = "huggingface", fetch(path.name, key)
    try:
        if kind == "huggingface":
            return Model(*read_huggingface(path), _tokenizer_beside(path), {})
        if kind == "openai":
            return Model(*read_openai(path), gpt2_tokenizer(), {})
        if kind == "file" and (path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")):
            return Model(*read_huggingface(path.parent, path.name), _tokenizer_beside(path.parent), {})
        path, content = _checkpoint_of(path, key) if kind == "run" else (path, _read(path, key))
        found = _model_in(content, path)
        own = tokenizer_in(content) if "tokenizer" in content else _tokenizer_beside(path.parent)  # of a book's export
        return Model(*found, own, _run_in(content))
    except ValueError as error:
        if str(error).startswith(f"{key}="):
            raise
        reason = "; ".join(line.split("; use ")[0] for line in str(error).splitlines())
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:  # values that are unlike any model's
        reason = f"it cannot be read ({type(error).__name__}: {str(error)[:100]})"
    raise ValueError(f"{key}={weights}: {printable(reason[:LONGEST_REASON])}; use {key}=<another file or folder>")


def load_weights(
    weights: str | Path, device: torch.device | str = "cpu", key: str = "weights", dtype: torch.dtype = torch.float32
) -> GPT:
    """The model that ``weights`` names, in evaluation mode. See :func:`read_weights`."""
    return build(*read_weights(weights, key)).to(device, dtype).eval()


def build(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model with copies of ``weights``; no random weights are drawn first."""
    net = empty_model(config)
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    assign(net, copies)
    return net


def save_weights(net: GPT, path: str | Path, tokenizer: tiktoken.Encoding | None = None) -> None:
    """Write the weights of ``net``, its config and its ``tokenizer``, without an optimizer: plain containers and
    tensors."""
    content = {"config": net.config.model_dump(mode="json"), WEIGHTS: net.state_dict()}
    write_sealed({**content, "tokenizer": tokenizer and to_json(tokenizer)}, Path(path))


def tokenizer_in(checkpoint: Any) -> tiktoken.Encoding:
    """The tokenizer that ``checkpoint`` holds, GPT-2's where it holds none.

    Raises:
        ValueError: it is damaged.
    """
    table = checkpoint.get("tokenizer") if isinstance(checkpoint, dict) else None
    return from_json(table) if table else gpt2_tokenizer()


def _tokenizer_beside(folder: Path) -> tiktoken.Encoding:
    return from_file(folder / FILE) or gpt2_tokenizer()


def _checkpoint_of(folder: Path, key: str) -> tuple[Path, dict[str, Any]]:
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    best = checkpoints / "best.ckpt"
    if best.exists():
        try:
            return best, _read(best, key)
        except DamagedError as error:
            log.warning("%s", str(error).split("; use ")[0])
    found = newest_good_checkpoint(checkpoints, unsealed=True, kinds=(WEIGHTS,))
    if found is None:
        raise ValueError(f"{key}={folder} has no checkpoint that can be read; use {key}=<another run folder>")
    log.info("reading %s", printable(found[0]))
    return found


def _run_in(content: dict[str, Any]) -> dict[str, Any]:
    run, fixed = content.get("run"), content.get("fixed_values")
    sha256 = fixed.get("data_sha256") if isinstance(fixed, dict) else None
    return {**run, "data_sha256": sha256} if isinstance(run, dict) else {}


def _model_in(content: Any, path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    unknown = "it holds no GPT of this project or of the book"
    if not isinstance(content, dict):
        raise ValueError(unknown)
    try:
        if "hyper_parameters" in content:
            config = GPTConfig(**content["hyper_parameters"]["model"])
            if "averaging" in content:
                log.info("using the averaged weights in %s", printable(path))
            kept = content.get("averaging", content)[WEIGHTS]
            tensors = {name.removeprefix("net."): value for name, value in kept.items()}
        elif "config" in content:
            config, tensors = GPTConfig(**content["config"]), content[WEIGHTS]
        else:
            tensors = content.get("model_state_dict", content)
            tensors = {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}
            if is_book(tensors):
                return read_book(tensors, path)
            raise ValueError(unknown)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(unknown) from None
    return config, to_ours(tensors, config, "ours")
