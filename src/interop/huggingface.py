"""Hugging Face folders, read and written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.interop.locate import HUGGINGFACE_FILES
from src.interop.names import RefusedError, from_ours, to_ours
from src.model.config import GPTConfig
from src.training.sealed import read_sealed

OWN_KEY = "gpt2_lightning"  # of config.json: our config, where Hugging Face's has no word for it
DEFAULTS = {  # of transformers' GPT2Config; and what of it this model computes
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "layer_norm_epsilon": (1e-5, (1e-5,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
}


def read_huggingface(folder: Path, refuse: Callable[[str], RefusedError]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights, in our layout, of a folder with ``config.json`` and safetensors or ``.bin``, sharded or
    not."""
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = _config(given, refuse)
    except RefusedError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise refuse(f"its config.json cannot be read ({type(error).__name__}: {error})") from None
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in _tensors(folder, refuse).items()}
    biases = [name for name in tensors if name.endswith("attn.c_attn.bias")]
    if not config.qkv_bias:
        if any(tensors[name].any() for name in biases):  # trained since
            config = GPTConfig(**asdict(config) | {"qkv_bias": True})
        else:
            for name in biases:
                del tensors[name]
    return config, to_ours(tensors, config, "huggingface", refuse)


def write_huggingface(folder: Path, config: GPTConfig, weights: Mapping[str, Tensor], eot_token: int | None) -> None:
    """``config.json``, ``generation_config.json`` and ``model.safetensors``; ``eot_token`` ends a text."""
    tensors = {f"transformer.{name}": tensor for name, tensor in from_ours(weights, "huggingface").items()}
    head = tensors.pop("transformer.lm_head.weight")
    if not config.tie_weights:
        tensors["lm_head.weight"] = head
    if not config.qkv_bias:
        for layer in range(config.n_layers):
            tensors[f"transformer.h.{layer}.attn.c_attn.bias"] = torch.zeros(3 * config.emb_dim)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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
        "bos_token_id": eot_token,
        "eos_token_id": eot_token,
        "use_cache": True,
        "dtype": "float32",
        OWN_KEY: {"qkv_bias": config.qkv_bias, "init": config.init},
    }
    _write_json(folder / "config.json", about)
    _write_json(folder / "generation_config.json", {"bos_token_id": eot_token, "eos_token_id": eot_token})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(given: dict[str, Any], refuse: Callable[[str], RefusedError]) -> GPTConfig:
    if given.get("model_type", "gpt2") != "gpt2":
        raise refuse(f"its config.json is that of a {given['model_type']}, not of a gpt2")
    for key, (default, computed) in DEFAULTS.items():
        if given.get(key, default) not in computed:
            raise refuse(f"its config.json has {key}={given[key]}, this model computes {computed[0]}")
    own = given.get(OWN_KEY, {})
    config = GPTConfig(
        vocab_size=given.get("vocab_size", 50257),
        context_length=given.get("n_positions", 1024),
        emb_dim=given.get("n_embd", 768),
        n_heads=given.get("n_head", 12),
        n_layers=given.get("n_layer", 12),
        drop_rate=float(given.get("resid_pdrop", 0.1)),
        qkv_bias=own.get("qkv_bias", True),
        tie_weights=given.get("tie_word_embeddings", True),
        init=own.get("init", "gpt2"),
    )
    if given.get("n_inner") not in (None, 4 * config.emb_dim):
        raise refuse(f"its config.json has n_inner={given['n_inner']}, this model has {4 * config.emb_dim}")
    return config


def _tensors(folder: Path, refuse: Callable[[str], RefusedError]) -> dict[str, Tensor]:
    name = next(name for name in HUGGINGFACE_FILES if (folder / name).is_file())
    files = [name]
    if name.endswith(".index.json"):
        try:
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise refuse(f"its {name} cannot be read ({type(error).__name__}: {error})") from None
        if outside := [file for file in files if Path(file).name != file]:
            raise refuse(f"its {name} names {outside[0]}, which is not in the folder")
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise refuse(f"it lacks {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(folder / file, refuse)
    return tensors


def read_tensors(path: Path, refuse: Callable[[str], RefusedError]) -> dict[str, Tensor]:
    """Names and tensors of one file, safetensors or PyTorch's."""
    if path.suffix != ".safetensors":
        return read_sealed(path, "weights")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise refuse(f"{path.name} is damaged ({error})") from None
