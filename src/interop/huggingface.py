"""Hugging Face folders, read and written."""

import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.checkpoint.storage import read_sealed
from src.files import write_json
from src.interop.checks import check_tensors, config_of
from src.interop.locate import HUGGINGFACE_FILES, read_json
from src.interop.names import from_ours, listed, to_ours
from src.model.config import GPTConfig

OWN_KEY = "gpt2_lightning"  # of config.json: the values of our config that Hugging Face's has no key for
DEFAULTS = {  # of transformers' GPT2Config, and the values that this model computes
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "layer_norm_epsilon": (1e-5, (1e-5,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
}


def read_huggingface(folder: Path, file: str | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights, in our layout, of a folder with ``config.json`` and safetensors or ``.bin``, sharded or not;
    ``file`` chooses one of several.

    Raises:
        ValueError: a file that is missing or damaged, or a model that is not a GPT-2.
    """
    config = _config(read_json(folder / "config.json"))
    tensors = _tensors(folder, file)
    biases = [name for name in tensors if name.endswith("attn.c_attn.bias")]
    if not config.qkv_bias:
        if any(tensors[name].any() for name in biases):  # trained after the export
            config = config.changed(qkv_bias=True)
        else:
            tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
    embedding, head = tensors.get("wte.weight"), tensors.get("lm_head.weight")
    if config.tie_weights and head is not None:
        if embedding is None:
            tensors["wte.weight"] = head
        elif embedding.dtype != head.dtype or not embedding.equal(head):
            # transformers does not tie these either, whatever its config says
            config = config.changed(tie_weights=False)
    return config, to_ours(tensors, config, "huggingface")


def write_huggingface(folder: Path, config: GPTConfig, weights: Mapping[str, Tensor], eot_token: int | None) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors``; ``eot_token`` ends a text."""
    tensors = {f"transformer.{name}": tensor for name, tensor in from_ours(weights, "huggingface").items()}
    head = tensors.pop("transformer.lm_head.weight")
    if not config.tie_weights:
        tensors["lm_head.weight"] = head
    if not config.qkv_bias:
        for layer in range(config.n_layers):
            tensors[f"transformer.h.{layer}.attn.c_attn.bias"] = torch.zeros(3 * config.emb_dim)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token_id": eot_token, "eos_token_id": eot_token}
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
        "n_inner": None,
        **{key: default for key, (default, _) in DEFAULTS.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_weights,
        **special,
        "use_cache": True,
        "dtype": "float32",
        OWN_KEY: {"qkv_bias": config.qkv_bias, "init": config.init},
    }
    write_json(folder / "config.json", about)
    write_json(folder / "generation_config.json", special)


def _config(given: dict[str, Any]) -> GPTConfig:
    if given.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"its config.json has model_type={shown(given['model_type'])}, this model is a gpt2")
    for key, (default, computed) in DEFAULTS.items():
        if given.get(key, default) not in computed:
            raise ValueError(f"its config.json has {key}={shown(given[key])}, this model computes {computed[0]}")
    own = given.get(OWN_KEY, {})
    config = config_of(
        vocab_size=given.get("vocab_size", 50257),
        context_length=given.get("n_positions", 1024),
        emb_dim=given.get("n_embd", 768),
        n_heads=given.get("n_head", 12),
        n_layers=given.get("n_layer", 12),
        drop_rate=given.get("resid_pdrop", 0.1),
        qkv_bias=own.get("qkv_bias", True),
        tie_weights=given.get("tie_word_embeddings", True),
        init=own.get("init", "gpt2"),
    )
    if given.get("n_inner") not in (None, 4 * config.emb_dim):
        raise ValueError(f"its config.json has n_inner={shown(given['n_inner'])}, this model has {4 * config.emb_dim}")
    return config


def _tensors(folder: Path, file: str | None) -> dict[str, Tensor]:
    """All tensors of ``file``, or of the shards that it is the index of, by their names without a prefix."""
    file = file or next(name for name in HUGGINGFACE_FILES if (folder / name).is_file())
    files = [file]
    if file.endswith(".index.json"):
        files = sorted({str(part) for part in read_json(folder / file)["weight_map"].values()})
        if outside := [part for part in files if Path(part).name != part]:
            raise ValueError(f"its {file} names {shown(outside[0])}, which is not in the folder")
        if missing := [part for part in files if not os.path.isfile(folder / part)]:
            raise ValueError(f"it lacks {listed(missing)}")
    tensors: dict[str, Tensor] = {}
    for part in files:
        found = _read_tensors(folder / part)
        check_tensors(found)
        for name, tensor in found.items():
            name = name.removeprefix("transformer.")
            if name in tensors:
                raise ValueError(f"it has {listed([name])} twice")
            tensors[name] = tensor
    return tensors


def _read_tensors(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return read_sealed(path, "weights")
    try:
        path.open("rb").close()  # if this fails, the system says why; safetensors does not
        return load_file(path)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged ({str(error)[:100]})") from None
