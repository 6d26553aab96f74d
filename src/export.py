"""A model for other tools: ``python -m src.export weights=<x> output=<folder>``. See ``conf/export.yaml``."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.cli import app
from src.cli.latest import with_latest_weights
from src.cli.typed import typed
from src.config import problems_of, refuse
from src.files import expanded
from src.interop.config import ExportConfig
from src.interop.locate import WEIGHTS_FILE, locate, run_folder
from src.runs.record import read_record

if TYPE_CHECKING:
    import tiktoken
    from torch import Tensor

    from src.model.config import GPTConfig
    from src.model.gpt import GPT

log = logging.getLogger(__name__)

POSITIONS = 64  # at which logits are compared


def check(cfg: DictConfig) -> ExportConfig:
    """``cfg`` as a frozen config.

    Raises:
        ValueError: every problem that can be found without reading the weights, one per line.
    """
    config = typed(cfg, ExportConfig)
    output = expanded(config.output)
    if os.path.lexists(output) and (output.is_symlink() or not output.is_dir() or any(output.iterdir())):
        found = [f"output={output} already exists; use output=<a new folder>"]
    else:
        found = problems_of(app.check_output, output)
    refuse([*problems_of(locate, config.weights), *found])
    return config


def export(cfg: DictConfig) -> float:
    """Write the model to a new folder, read it again, and return the largest difference of logits.

    The folder appears only after everything in it is written and was found to be the same model.

    Raises:
        ValueError: the problems of the config; weights that cannot be read; a copy that differs; a full disk.
    """
    asked = check(cfg)
    from safetensors import SafetensorError

    from src.interop.model_card import model_card
    from src.interop.weights import build, load_weights, read_model

    output = expanded(asked.output)
    config, weights, tokenizer, run = read_model(asked.weights)
    config, weights = _unpadded(config, weights, tokenizer.n_vocab)
    aside = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent)
        part = Path(aside, output.name)
        part.mkdir()
        folder = run_folder(asked.weights)
        card = model_card(config, run, read_record(folder) if folder else {}, output.name)
        _write(part, asked.format, config, weights, tokenizer, card)
        for file in part.iterdir():
            file.chmod(part.stat().st_mode & 0o666)  # the user's umask: safetensors writes for the owner only
        net = build(config, weights).eval()
        difference = _largest_difference(net, load_weights(part, key="output"))
        if not difference <= 1e-4:  # true of NaN too
            raise ValueError(f"output={output} would be another model, its logits differ by up to {difference:.1e}")
        if output.exists():
            output.rmdir()
        part.rename(output)
    except (OSError, RuntimeError, SafetensorError) as error:  # on a full disk PyTorch and safetensors raise their own
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
        raise ValueError(f"output={output} could not be written ({reason}); use output=<a folder elsewhere>") from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(f"{output}: {parameters:,} parameters, {', '.join(sorted(file.name for file in output.iterdir()))}")
    positions = min(POSITIONS, config.context_length)
    print(f"read again, the largest difference of a logit is {difference:g}, at {positions} positions")
    return difference


def _unpadded(config: GPTConfig, weights: dict[str, Tensor], n_vocab: int) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The model without the rows of a padded vocabulary, for which the tokenizer has none of its ``n_vocab`` tokens."""
    if config.vocab_size <= n_vocab:
        return config, weights
    log.info("leaving out %d padded rows of the vocabulary", config.vocab_size - n_vocab)
    cut = {name: weights[name][:n_vocab] for name in ("tok_emb.weight", "head.weight")}
    return config.changed(vocab_size=n_vocab), {**weights, **cut}


def _write(
    folder: Path,
    kind: str,
    config: GPTConfig,
    weights: dict[str, Tensor],
    tokenizer: tiktoken.Encoding,
    card: str,
) -> None:
    if kind == "weights":
        from src.interop.weights import build, save_weights

        save_weights(build(config, weights), folder / WEIGHTS_FILE, tokenizer)
    elif kind == "book":
        from src.interop.book import write_book
        from src.tokenizer.table import FILE, to_json

        write_book(folder, config, weights)
        if table := to_json(tokenizer):
            (folder / FILE).write_text(table, encoding="utf-8")
    else:
        from src.interop.huggingface import write_huggingface
        from src.interop.tokenizer_files import write_tokenizer

        fits = config.vocab_size >= tokenizer.n_vocab
        write_huggingface(folder, config, weights, tokenizer.eot_token if fits else None)
        if fits:
            write_tokenizer(folder, tokenizer, config.context_length)
        else:
            log.warning("no tokenizer files: the model has %d tokens, the tokenizer more", config.vocab_size)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _largest_difference(net: GPT, other: GPT) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    length = min(POSITIONS, net.config.context_length)
    tokens = torch.randint(net.config.vocab_size, (1, length), generator=generator)
    with torch.no_grad():
        return (net(tokens) - other(tokens)).abs().max().item()


if __name__ == "__main__":
    app.launch("export", export, check, with_latest_weights)
