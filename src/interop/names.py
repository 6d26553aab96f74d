"""The one table of tensor names, and what each layout does to a tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

from src.interop.checks import BUFFERS, Refuse, check_tensors
from src.model.config import GPTConfig

LAYOUTS = ("ours", "huggingface", "openai", "book")

# {} is the layer, * stands for query, key and value, which the book keeps apart. Hugging Face's files may have
# "transformer." in front of all but the head, OpenAI's have "model/".
TABLE = (
    # ours                          Hugging Face                   OpenAI                  the book
    ("tok_emb.weight", "wte.weight", "wte", "tok_emb.weight"),
    ("pos_emb.weight", "wpe.weight", "wpe", "pos_emb.weight"),
    ("blocks.{}.norm1.weight", "h.{}.ln_1.weight", "h{}/ln_1/g", "trf_blocks.{}.norm1.scale"),
    ("blocks.{}.norm1.bias", "h.{}.ln_1.bias", "h{}/ln_1/b", "trf_blocks.{}.norm1.shift"),
    ("blocks.{}.attn.qkv.weight", "h.{}.attn.c_attn.weight", "h{}/attn/c_attn/w", "trf_blocks.{}.att.W_*.weight"),
    ("blocks.{}.attn.qkv.bias", "h.{}.attn.c_attn.bias", "h{}/attn/c_attn/b", "trf_blocks.{}.att.W_*.bias"),
    ("blocks.{}.attn.out_proj.weight", "h.{}.attn.c_proj.weight", "h{}/attn/c_proj/w",
        "trf_blocks.{}.att.out_proj.weight"),
    ("blocks.{}.attn.out_proj.bias", "h.{}.attn.c_proj.bias", "h{}/attn/c_proj/b", "trf_blocks.{}.att.out_proj.bias"),
    ("blocks.{}.norm2.weight", "h.{}.ln_2.weight", "h{}/ln_2/g", "trf_blocks.{}.norm2.scale"),
    ("blocks.{}.norm2.bias", "h.{}.ln_2.bias", "h{}/ln_2/b", "trf_blocks.{}.norm2.shift"),
    ("blocks.{}.ff.up_proj.weight", "h.{}.mlp.c_fc.weight", "h{}/mlp/c_fc/w", "trf_blocks.{}.ff.layers.0.weight"),
    ("blocks.{}.ff.up_proj.bias", "h.{}.mlp.c_fc.bias", "h{}/mlp/c_fc/b", "trf_blocks.{}.ff.layers.0.bias"),
    ("blocks.{}.ff.down_proj.weight", "h.{}.mlp.c_proj.weight", "h{}/mlp/c_proj/w", "trf_blocks.{}.ff.layers.2.weight"),
    ("blocks.{}.ff.down_proj.bias", "h.{}.mlp.c_proj.bias", "h{}/mlp/c_proj/b", "trf_blocks.{}.ff.layers.2.bias"),
    ("final_norm.weight", "ln_f.weight", "ln_f/g", "final_norm.scale"),
    ("final_norm.bias", "ln_f.bias", "ln_f/b", "final_norm.shift"),
    ("head.weight", "lm_head.weight", None, "out_head.weight"),
)  # fmt: skip
CONV1D = ("qkv.weight", "out_proj.weight", "up_proj.weight", "down_proj.weight")  # (in, out) at OpenAI and Hugging Face
SHOWN = 5  # names in a message


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model in our layout, the head included."""
    V, T, C = config.vocab_size, config.context_length, config.emb_dim
    layer = {
        "norm1.weight": (C,),
        "norm1.bias": (C,),
        "attn.qkv.weight": (3 * C, C),
        **({"attn.qkv.bias": (3 * C,)} if config.qkv_bias else {}),
        "attn.out_proj.weight": (C, C),
        "attn.out_proj.bias": (C,),
        "norm2.weight": (C,),
        "norm2.bias": (C,),
        "ff.up_proj.weight": (4 * C, C),
        "ff.up_proj.bias": (4 * C,),
        "ff.down_proj.weight": (C, 4 * C),
        "ff.down_proj.bias": (C,),
    }
    return {
        "tok_emb.weight": (V, C),
        "pos_emb.weight": (T, C),
        **{f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in layer.items()},
        "final_norm.weight": (C,),
        "final_norm.bias": (C,),
        "head.weight": (V, C),
    }


def their_names(name: str, layout: str) -> list[str]:
    """What ``layout`` calls our tensor ``name``: one name, or three for query, key and value, or none."""
    number = name.split(".")[1] if name.startswith("blocks.") else ""
    ours = name.replace(f"blocks.{number}.", "blocks.{}.") if number else name
    theirs = next(row for row in TABLE if row[0] == ours)[LAYOUTS.index(layout)]
    if theirs is None:
        return []
    theirs = theirs.replace("{}", number)
    return [theirs.replace("*", part) for part in ("query", "key", "value")] if "*" in theirs else [theirs]


def to_ours(tensors: Mapping[str, Tensor], config: GPTConfig, layout: str, refuse: Refuse) -> dict[str, Tensor]:
    """``tensors`` of a file in ``layout`` as a state dict of ours, float32; a tied head is the token embedding.

    ``refuse`` makes an error of a reason: tensors that are missing, or more than the model has, or of another shape, or
    that hold infinities or NaN.
    """
    check_tensors(tensors, refuse)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    if config.n_layers > len(tensors):
        raise refuse(f"it has {len(tensors)} tensors, too few for a model of {config.n_layers} layers")
    wanted = shapes(config)
    found, missing = {}, []
    for name, shape in wanted.items():
        theirs = their_names(name, layout)
        if name == "head.weight" and config.tie_weights:
            if "tok_emb.weight" in found:
                found[name] = found["tok_emb.weight"]
                for one in theirs:
                    if not found[name].equal(tensors.pop(one, found[name]).float()):
                        raise refuse(f"{one} is not the token embedding that it should be tied to")
            continue
        if absent := [one for one in theirs if one not in tensors]:
            missing += absent
            continue
        found[name] = _whole([tensors.pop(one) for one in theirs], name, shape, layout, theirs, refuse)
    if missing:
        raise refuse(f"it lacks {listed(missing)}" + (f", and has {listed(list(tensors))}" if tensors else ""))
    if tensors:
        raise refuse(f"it has {listed(list(tensors))}, which no model of this config has")
    return found


def from_ours(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A state dict of ours in ``layout``, each tensor contiguous and on its own."""
    found = {}
    for name, tensor in weights.items():
        theirs = their_names(name, layout)
        if layout in ("huggingface", "openai") and name.endswith(CONV1D):
            tensor = tensor.t()
        for one, part in zip(theirs, tensor.chunk(len(theirs)) if theirs else (), strict=True):
            found[one] = part.clone(memory_format=torch.contiguous_format)
    return found


def _whole(
    parts: list[Tensor], name: str, shape: tuple[int, ...], layout: str, theirs: list[str], refuse: Refuse
) -> Tensor:
    rows = (shape[0] // len(parts), *shape[1:])  # the book's query, key and value are thirds
    conv1d = layout in ("huggingface", "openai") and name.endswith(CONV1D)
    stored = rows[::-1] if conv1d else rows
    if layout == "openai" and conv1d:
        parts = [part.squeeze(0) if part.dim() == 3 else part for part in parts]  # (1, in, out)
    for one, part in zip(theirs, parts, strict=True):
        if tuple(part.shape) != stored or not part.is_floating_point():
            raise refuse(f"{one} is {tuple(part.shape)} {str(part.dtype)[6:]}, the model has {stored}")
    parts = [part.float() for part in parts]
    for one, part in zip(theirs, parts, strict=True):
        if not torch.nn.utils.get_total_norm([part], float("inf")).isfinite():
            raise refuse(f"{one} holds infinities or NaN")
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.t() if conv1d else whole


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:100] for name in names[:SHOWN]) + more
