"""How good a model is: ``python -m src.evaluate weights=<x> [overrides]``. See ``conf/evaluate.yaml``."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src import cli
from src.data.config import DataConfig
from src.evaluation.config import EvaluationConfig
from src.files import write_json
from src.interop.locate import problems_of_weights
from src.record import git_revision, versions

if TYPE_CHECKING:
    import tiktoken

    from src.model.gpt import GPT

log = logging.getLogger(__name__)


def find_problems(cfg: DictConfig) -> list[str]:
    """Everything wrong with ``cfg`` that can be known without reading weights or text."""
    checked, found = cli.check_sections(cfg, {"": EvaluationConfig, "data": DataConfig})
    if "" not in checked:
        return found
    config = checked[""]
    found += problems_of_weights(config.weights)
    for key in "lambada", "multiple_choice":
        path = getattr(config, key)
        if path is not None and not Path(os.path.expanduser(path)).is_file():
            found.append(f"{key}={path} is no file (seen from {Path.cwd()}): {key}=<a file of JSON lines>")
    if cfg.data.stride is not None:
        found.append(f"data.stride={cfg.data.stride} is for training: stride={cfg.data.stride}")
    return found


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluate as ``cfg`` says and leave ``evaluation.json``, ``surprises.md`` and ``plots`` in ``folder``; the content
    of the first is returned.

    Raises:
        ValueError: the problems of the config; weights, a text or a task that cannot be read, or do not fit together.
    """
    if problems := find_problems(cfg):
        raise ValueError("\n".join(problems))
    from src.evaluation import losses, tasks
    from src.evaluation.report import write_report
    from src.generation.text import check_vocabulary
    from src.interop.weights import load_weights
    from src.tokenizer import gpt2_tokenizer, token_byte_counts
    from src.training.device import pick_accelerator

    started = time.perf_counter()
    config = EvaluationConfig(**{key: cfg[key] for key in EvaluationConfig.__dataclass_fields__})
    data = DataConfig(**{key: value for key, value in cfg.data.items() if key != "_target_"})
    chosen = {}  # read before any work starts
    if config.lambada is not None:
        chosen[tasks.lambada] = tasks.read_passages(config.lambada)
    if config.multiple_choice is not None:
        chosen[tasks.multiple_choice] = tasks.read_questions(config.multiple_choice)
    tokenizer = gpt2_tokenizer()
    tokens, fitted_on, sha256 = _text(data, config.split, tokenizer)
    net = load_weights(config.weights, pick_accelerator(config.device, "device"))
    check_vocabulary(net, tokenizer)
    _check_model(config, net)
    for task, examples in chosen.items():
        tasks.check_lengths(task.__name__, examples, tokenizer, net.config.context_length)
    length = config.context_length or net.config.context_length
    with _progress("tokens", len(tokens) - 1) as progress:
        byte_counts = token_byte_counts(tokenizer)
        settings = (length, config.stride, data.batch_size, byte_counts, config.surprises)
        found = losses.text_loss(net, tokens, *settings, progress)
    result: dict[str, Any] = {
        "status": "completed",
        "weights": config.weights,
        "split": config.split,
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "loss_of_whole_windows": found.whole_windows,
        "uniform_loss": math.log(tokenizer.n_vocab),
        "unigram_loss": losses.unigram_loss(tokens, fitted_on, tokenizer.n_vocab),
        "context_length": length,
        "stride": config.stride or length,
    }
    for task, examples in chosen.items():
        with _progress(task.__name__, None) as progress:
            scores = task(net, examples, tokenizer, data.batch_size, progress=progress)
        result |= {f"{task.__name__}_{key}": value for key, value in scores.items()}
    for key in "bits_per_byte", "loss_of_whole_windows":
        if math.isnan(result[key]):  # no bytes, no whole windows
            del result[key]
    for key, value in result.items():
        log.info("%-30s  %s", key.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else value)
    write_report(found, tokens, tokenizer, folder)
    result |= {
        "loss_by_position": [None if math.isnan(value) else value for value in found.by_position.tolist()],
        "data_sha256": sha256,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": versions(),
        "git": git_revision(),
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / "evaluation.json", result)
    log.info("evaluation folder: %s", folder)
    return result


def _text(data: DataConfig, split: str, tokenizer: tiktoken.Encoding) -> tuple[Any, Any, str]:
    """The tokens to score, those that the unigram baseline knows, and the hash of the text."""
    from src.data.tokens import read_split

    train, val, sha256 = read_split(data, tokenizer, 1.0 if split == "all" else data.train_ratio)
    return (val if split == "val" else train), train, sha256


def _check_model(config: EvaluationConfig, net: GPT) -> None:
    if (config.context_length or 0) > net.config.context_length:
        raise ValueError(
            f"context_length={config.context_length} is more than the model's {net.config.context_length}: "
            f"context_length={net.config.context_length}"
        )


@contextmanager
def _progress(what: str, total: int | None):
    """A bar on a terminal, nothing elsewhere."""
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _run(cfg: DictConfig) -> float:
    """One Hydra job; its objective is the loss."""
    return evaluate(cfg, Path(HydraConfig.get().runtime.output_dir))["loss"]


if __name__ == "__main__":
    cli.launch("evaluate", _run, find_problems)
