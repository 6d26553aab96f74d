"""The book's own files: a state dict of its ``GPTModel``, with or without the state of an optimizer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.files import write_json
from src.interop.checks import check_tensors, config_of
from src.interop.locate import BOOK_FILE, read_json
from src.interop.names import from_ours, to_ours
from src.model.config import GPTConfig

CONFIG_FILE = "model.json"
HEAD_SIZE = 64  # of every GPT-2
KEYS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias")


def is_book(tensors: Mapping[str, Tensor]) -> bool:
    return "trf_blocks.0.norm1.scale" in tensors


def read_book(tensors: Mapping[str, Tensor], path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights, in our layout, of the book's state dict ``tensors`` from ``path``.

    The shapes determine everything except the number of heads, which comes from the ``GPT_CONFIG`` in ``model.json``
    beside the file, or else from GPT-2's head size of 64. A head equal to the token embedding is read as tied.

    Raises:
        ValueError: the number of heads is not known, or the tensors are not those of a ``GPTModel``.
    """
    check_tensors(tensors)
    beside = path.parent / CONFIG_FILE
    given = read_json(beside) if beside.exists() else {}
    try:
        embedding, head = tensors["tok_emb.weight"], tensors["out_head.weight"]
        context_length = len(tensors["pos_emb.weight"])
    except KeyError as error:
        raise ValueError(f"it is not a state dict of the book's GPTModel, it has no {error}") from None
    vocab_size, emb_dim = embedding.shape
    if "n_heads" not in given and emb_dim % HEAD_SIZE:
        raise ValueError(
            f'it does not say how many heads it has; write its GPT_CONFIG, at least {{"n_heads": ...}}, to {beside}'
        )
    config = config_of(
        vocab_size=vocab_size,
        context_length=context_length,
        emb_dim=emb_dim,
        n_heads=given.get("n_heads", emb_dim // HEAD_SIZE),
        n_layers=len({name.split(".")[1] for name in tensors if name.startswith("trf_blocks.")}),
        drop_rate=given.get("drop_rate", 0.1),
        qkv_bias="trf_blocks.0.att.W_query.bias" in tensors,
        tie_weights=torch.equal(embedding, head),
    )
    return config, to_ours(tensors, config, "book")


def write_book(folder: Path, config: GPTConfig, weights: Mapping[str, Tensor]) -> None:
    """Write ``model.pth``, which the book's ``GPTModel.load_state_dict`` accepts, and its ``GPT_CONFIG`` as
    ``model.json``."""
    tensors = from_ours(weights, "book")
    T = config.context_length
    mask = torch.triu(torch.ones(T, T), diagonal=1)
    tensors |= {f"trf_blocks.{layer}.att.mask": mask for layer in range(config.n_layers)}
    torch.save(tensors, folder / BOOK_FILE)
    write_json(folder / CONFIG_FILE, {key: getattr(config, key) for key in KEYS})
