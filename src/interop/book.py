"""The book's own files: a state dict of its ``GPTModel``, or that and an optimizer's."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.interop.checks import Refuse, check_tensors
from src.interop.locate import BOOK_FILE, read_json
from src.interop.names import from_ours, to_ours
from src.model.config import GPTConfig

CONFIG_FILE = "model.json"
HEAD_SIZE = 64  # of every GPT-2
KEYS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias")


def is_book(tensors: Mapping[str, Tensor]) -> bool:
    return "trf_blocks.0.norm1.scale" in tensors


def read_book(tensors: Mapping[str, Tensor], path: Path, refuse: Refuse) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights, in our layout, of the book's state dict ``tensors`` from ``path``.

    Its shapes say everything but the number of heads, which comes from the ``GPT_CONFIG`` in ``model.json`` beside the
    file, or else from GPT-2's head size of 64. A head equal to the token embedding is taken for a tied one.
    """
    check_tensors(tensors, refuse)
    beside = path.parent / CONFIG_FILE
    try:
        given = read_json(beside) if beside.exists() else {}
    except ValueError as error:
        raise refuse(str(error)) from None
    try:
        vocab_size, emb_dim = tensors["tok_emb.weight"].shape
        layers = {int(name.split(".")[1]) for name in tensors if name.startswith("trf_blocks.")}
        if "n_heads" not in given and emb_dim % HEAD_SIZE:
            raise refuse(
                f'it does not say how many heads it has: write its GPT_CONFIG, {{"n_heads": ...}} at least, to {beside}'
            )
        config = GPTConfig(
            vocab_size=vocab_size,
            context_length=len(tensors["pos_emb.weight"]),
            emb_dim=emb_dim,
            n_heads=given.get("n_heads", emb_dim // HEAD_SIZE),
            n_layers=len(layers),
            drop_rate=given.get("drop_rate", 0.1),
            qkv_bias="trf_blocks.0.att.W_query.bias" in tensors,
            tie_weights=torch.equal(tensors["tok_emb.weight"], tensors["out_head.weight"]),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise refuse(f"it is no state dict of the book's GPTModel ({type(error).__name__}: {error})") from None
    return config, to_ours(tensors, config, "book", refuse)


def write_book(folder: Path, config: GPTConfig, weights: Mapping[str, Tensor]) -> None:
    """``model.pth``, which the book's ``GPTModel.load_state_dict`` takes, and its ``GPT_CONFIG`` as ``model.json``."""
    tensors = from_ours(weights, "book")
    T = config.context_length
    mask = torch.triu(torch.ones(T, T), diagonal=1)
    tensors |= {f"trf_blocks.{layer}.att.mask": mask for layer in range(config.n_layers)}
    torch.save(tensors, folder / BOOK_FILE)
    given = {key: value for key, value in config if key in KEYS}
    (folder / CONFIG_FILE).write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
