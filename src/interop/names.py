"""The one table of tensor names, and what each layout does to a tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

from src.interop.checks import BUFFERS, check_tensors
from src.model.architectures import build_model
from src.model.config import GPTConfig
from src.model.gpt import GPT

LAYOUTS = ("ours", "huggingface", "openai", "book")

# {} is the layer; * stands for query, key and value, which the book keeps apart. In Hugging Face's files "transformer."
# may precede every name except the head's; in OpenAI's files "model/" does.
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


def empty_model(config: GPTConfig) -> GPT:
    """The model of ``config`` on the meta device: shapes without memory."""
    with torch.device("meta"):
        return build_model(config)


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model in our layout, the head included."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


def their_names(name: str, layout: str) -> list[str]:
    """What ``layout`` calls our tensor ``name``: one name, three for query, key and value, or none.

    Raises:
        ValueError: the layout has no name for it.
    """
    if layout == "ours":
        return [name]
    number = name.split(".")[1] if name.startswith("blocks.") else ""
    ours = name.replace(f"blocks.{number}.", "blocks.{}.") if number else name
    row = next((row for row in TABLE if row[0] == ours), None)
    if row is None:
        raise ValueError(f"{name} has no name in the layout {layout}")
    theirs = row[LAYOUTS.index(layout)]
    if theirs is None:
        return []
    theirs = theirs.replace("{}", number)
    return [theirs.replace("*", part) for part in ("query", "key", "value")] if "*" in theirs else [theirs]


def to_ours(tensors: Mapping[str, Tensor], config: GPTConfig, layout: str) -> dict[str, Tensor]:
    """``tensors`` of a file in ``layout`` as our state dict in float32; a tied head is the token embedding.

    Raises:
        ValueError: tensors are missing, superfluous, of another shape, or not finite.
    """
    check_tensors(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    if config.n_layers > len(tensors):
        raise ValueError(f"it has {len(tensors)} tensors, too few for a model of {config.n_layers} layers")
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, shape in shapes(config).items():
        theirs = their_names(name, layout)
        if name == "head.weight" and config.tie_weights:
            if "tok_emb.weight" in found:
                found[name] = found["tok_emb.weight"]
                for one in theirs:
                    if not found[name].equal(tensors.pop(one, found[name]).float()):
                        raise ValueError(f"{one} differs from the token embedding that it is tied to")
            continue
        if absent := [one for one in theirs if one not in tensors]:
            missing += absent
            continue
        found[name] = _whole({one: tensors.pop(one) for one in theirs}, name, shape, layout)
    if missing:
        raise ValueError(f"it lacks {listed(missing)}" + (f", and has {listed(list(tensors))}" if tensors else ""))
    if tensors:
        raise ValueError(f"it has {listed(list(tensors))}, which a model of this config does not have")
    return found


def from_ours(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our state dict in ``layout``; each tensor is contiguous and has its own memory."""
    found = {}
    for name, tensor in weights.items():
        theirs = their_names(name, layout)
        if _is_conv1d(name, layout):
            tensor = tensor.t()
        for one, part in zip(theirs, tensor.chunk(len(theirs)) if theirs else (), strict=True):
            found[one] = part.clone(memory_format=torch.contiguous_format)
    return found


def _whole(parts: dict[str, Tensor], name: str, shape: tuple[int, ...], layout: str) -> Tensor:
    """Our tensor ``name`` of ``shape`` from its ``parts`` in ``layout``, by their names there."""
    conv1d = _is_conv1d(name, layout)
    expected = (shape[0] // len(parts), *shape[1:])  # the book's query, key and value are thirds
    expected = expected[::-1] if conv1d else expected
    values = []
    for one, part in parts.items():
        if conv1d and layout == "openai" and part.dim() == 3:
            part = part.squeeze(0)  # (1, in, out)
        if tuple(part.shape) != expected or not part.is_floating_point():
            raise ValueError(f"{one} is {tuple(part.shape)} {str(part.dtype)[6:]}, the model has {expected}")
        values.append(part.float())
        if not torch.nn.utils.get_total_norm(values[-1:], float("inf")).isfinite():
            raise ValueError(f"{one} holds infinities or NaN")
    whole = values[0] if len(values) == 1 else torch.cat(values)
    return whole.t() if conv1d else whole


def _is_conv1d(name: str, layout: str) -> bool:
    return layout in ("huggingface", "openai") and name.endswith(CONV1D)


def listed(names: list[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:100] for name in names[:SHOWN]) + more


def assign(net: GPT, weights: dict[str, Tensor]) -> None:
    """Make ``weights`` the parameters of ``net``, without a copy."""
    net.load_state_dict(weights, assign=True)
    if net.config.tie_weights:
        net.head.weight = net.tok_emb.weight
