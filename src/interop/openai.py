"""OpenAI's GPT-2 as it was published: a TensorFlow checkpoint and ``hparams.json``."""

from pathlib import Path

from torch import Tensor

from src.interop.bundle import read_bundle
from src.interop.checks import config_of
from src.interop.locate import read_json
from src.interop.names import listed, to_ours
from src.model.config import GPTConfig


def read_openai(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights, in our layout, of a checkpoint with ``hparams.json`` beside it; ``path`` is the prefix of the
    checkpoint's files, or a folder with one checkpoint.

    Raises:
        ValueError: several checkpoints, damage, or tensors that do not fit ``hparams.json``.
    """
    prefix = path
    if path.is_dir():
        indices = sorted(path.glob("*.index"))
        if len(indices) != 1:
            raise ValueError(f"it has {len(indices)} checkpoints, name one of {listed([i.stem for i in indices])}")
        prefix = indices[0].with_suffix("")
    numbers = read_json(prefix.parent / "hparams.json")
    try:
        config = config_of(
            vocab_size=numbers["n_vocab"],
            context_length=numbers["n_ctx"],
            emb_dim=numbers["n_embd"],
            n_heads=numbers["n_head"],
            n_layers=numbers["n_layer"],
            qkv_bias=True,
            tie_weights=True,
        )
    except KeyError as error:
        raise ValueError(f"its hparams.json has no {error}") from None
    try:
        tensors = dict(read_bundle(prefix, "model/"))
    except OSError as error:
        raise ValueError(f"its checkpoint lacks {Path(error.filename or prefix).name} ({error.strerror})") from None
    except (ValueError, IndexError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"its checkpoint {prefix.name} is damaged ({str(error)[:100]})") from None
    return config, to_ours(tensors, config, "openai")
