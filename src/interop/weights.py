"""``weights=``: a model out of whatever holds one; and into a file of our own."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.checkpoint.find import newest_good_checkpoint
from src.checkpoint.sealed import DamagedError, printable, read_sealed, write_atomically
from src.interop.book import is_book, read_book
from src.interop.checks import Refuse, RefusedError, refusal
from src.interop.hub import fetch
from src.interop.huggingface import read_huggingface
from src.interop.locate import locate
from src.interop.names import to_ours
from src.interop.openai import read_openai
from src.model.architectures import build_model
from src.model.config import GPTConfig
from src.model.gpt import GPT

log = logging.getLogger(__name__)


def read_weights(weights: str | Path, key: str = "weights") -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and state dict, float32, of what ``weights`` names: a checkpoint or folder of a run, a file by
    :func:`save_weights`, a Hugging Face folder, a folder with OpenAI's TensorFlow checkpoint, the book's ``.pth``, or
    gpt2, gpt2-medium, gpt2-large, gpt2-xl. ``key`` is the override that named it, for the messages.

    Of a run folder it is ``best.ckpt``, or where there is none that is sound, the newest checkpoint.

    Raises:
        ValueError: nothing there, damaged, of another model, or not to be had; in one line, with the cure.
    """
    return read_weights_and_run(weights, key)[:2]


def read_weights_and_run(
    weights: str | Path, key: str = "weights"
) -> tuple[GPTConfig, dict[str, Tensor], dict[str, Any]]:
    """What :func:`read_weights` reads, and what a run's checkpoint says of its run: ``step``, ``tokens_seen``,
    ``precision``, ``metrics``, ``data``, ``eval_windows``, ``data_sha256``; nothing where the weights are no run's."""
    refuse = refusal(weights, key)
    kind, path = locate(str(weights), key)
    if kind == "hub":
        kind, path = "huggingface", fetch(path.name, key)
    try:
        if kind == "run":
            path, content = _checkpoint_of(path, key)
            return *_of_content(content, path, refuse), _run_of(content)
        if kind == "huggingface":
            return *read_huggingface(path, refuse), {}
        if kind == "openai":
            return *read_openai(path, refuse), {}
        if path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json"):
            return *read_huggingface(path.parent, refuse, path.name), {}
        content = read_sealed(path, key, unsealed=True)
        return *_of_content(content, path, refuse), _run_of(content)
    except ValueError as error:
        if isinstance(error, RefusedError) or str(error).startswith(f"{key}="):
            raise
        reasons = [line.split("; use ")[0] for line in str(error).splitlines()]
        raise refuse("; ".join(reasons)) from None  # numbers that no model can have
    except (RuntimeError, TypeError) as error:  # what PyTorch makes of a tensor that is unlike any of a model
        raise refuse(f"it cannot be read ({str(error)[:100]})") from None


def load_weights(
    weights: str | Path,
    device: torch.device | str = "cpu",
    key: str = "weights",
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """The model that ``weights`` names, in evaluation mode. See :func:`read_weights`."""
    return build(*read_weights(weights, key)).to(device, dtype).eval()


def build(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model that holds copies of ``weights``, without drawing any first."""
    with torch.device("meta"):
        net = build_model(config)
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    net.load_state_dict(copies, assign=True)
    if config.tie_weights:
        net.head.weight = net.tok_emb.weight
    return net


def save_weights(net: GPT, path: str | Path) -> None:
    """Write the weights of ``net`` and its config, without an optimizer: plain containers and tensors."""
    write_atomically({"config": net.config.model_dump(mode="json"), "state_dict": net.state_dict()}, Path(path))


def _checkpoint_of(folder: Path, key: str) -> tuple[Path, dict[str, Any]]:
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    best = checkpoints / "best.ckpt"
    if best.is_file():
        try:
            return best, read_sealed(best, key, unsealed=True)
        except DamagedError as error:
            log.warning("%s", str(error).split("; use ")[0])
    found = newest_good_checkpoint(checkpoints, unsealed=True)
    if found is None:
        raise ValueError(f"{key}={folder} has no checkpoint that can be read: {key}=<another run folder>")
    log.info("taking %s", printable(found[0]))
    return found


def _run_of(content: Any) -> dict[str, Any]:
    run, fixed = content.get("run"), content.get("fixed_values")
    sha256 = fixed.get("data_sha256") if isinstance(fixed, dict) else None
    return {**run, "data_sha256": sha256} if isinstance(run, dict) else {}


def _of_content(content: Any, path: Path, refuse: Refuse) -> tuple[GPTConfig, dict[str, Tensor]]:
    try:
        if "hyper_parameters" in content:
            config = GPTConfig(**content["hyper_parameters"]["model"])
            tensors = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
        elif "config" in content:
            config, tensors = GPTConfig(**content["config"]), content["state_dict"]
        else:
            tensors = content.get("model_state_dict", content)
            tensors = {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}
            if is_book(tensors):
                return read_book(tensors, path, refuse)
            raise KeyError("tok_emb")
        return config, to_ours(tensors, config, "ours", refuse)
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise refuse("it holds no GPT of this project or of the book") from None
