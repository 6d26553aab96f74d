"""OpenAI's GPT-2 as it was published: a TensorFlow checkpoint and ``hparams.json``."""

from pathlib import Path

from torch import Tensor

from src.interop.bundle import read_bundle
from src.interop.checks import Refuse
from src.interop.locate import read_json
from src.interop.names import listed, to_ours
from src.model.config import GPTConfig


def read_openai(path: Path, refuse: Refuse) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights, in our layout, of a checkpoint with ``hparams.json`` beside it; ``path`` is the checkpoint's
    prefix, or the folder of one."""
    prefix = path
    if path.is_dir():
        indices = sorted(path.glob("*.index"))
        if len(indices) != 1:
            raise refuse(f"it has {len(indices)} checkpoints, name one of {listed([i.stem for i in indices])}")
        prefix = indices[0].with_suffix("")
    try:
        numbers = read_json(prefix.parent / "hparams.json")
        config = GPTConfig(
            vocab_size=numbers["n_vocab"],
            context_length=numbers["n_ctx"],
            emb_dim=numbers["n_embd"],
            n_heads=numbers["n_head"],
            n_layers=numbers["n_layer"],
            qkv_bias=True,
            tie_weights=True,
        )
    except KeyError as error:
        raise refuse(f"its hparams.json has no {error}") from None
    try:
        tensors = dict(read_bundle(prefix, "model/"))
    except OSError as error:
        raise refuse(f"its checkpoint lacks {Path(error.filename or prefix).name} ({error.strerror})") from None
    except (ValueError, IndexError, TypeError, OverflowError, RuntimeError) as error:
        raise refuse(f"its checkpoint {prefix.name} is damaged ({str(error)[:100]})") from None
    return config, to_ours(tensors, config, "openai", refuse)
