"""How good a model is: ``python -m src.evaluate weights=<x> [overrides]``. See ``conf/evaluate.yaml``."""

from __future__ import annotations

import glob
import json
import logging
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.cli import app
from src.cli.latest import data_of_run, with_latest_weights
from src.cli.quoting import as_meant, quoted
from src.data.config import DataConfig
from src.evaluation.config import PRECISIONS, EvaluationConfig
from src.files import write_json
from src.interop.locate import problems_of_weights
from src.runs.record import git_revision, versions

if TYPE_CHECKING:
    import tiktoken
    import torch

    from src.model.gpt import GPT

log = logging.getLogger(__name__)

OF_A_TEXT = (
    "format",
    "path",
    "url",
    "mirrors",
    "sha256",
    "size",
    "train_ratio",
    "special_tokens",
    "cache_dir",
    "batch_size",
)  # of data: what a run's weights bring along


def with_data_of_run(overrides: list[str]) -> list[str]:
    """``overrides`` behind those that name the text of the run whose ``weights`` they are, and how it is cut, unless
    they ask for another.

    Raises:
        ValueError: no ``data`` is asked for, and the weights are no run's, of runs on different texts, or of one whose
            text is gone.
    """
    overrides = with_latest_weights(overrides)
    given = {override.split("=")[0].lstrip("+"): override.split("=", 1)[-1] for override in overrides}
    if "weights" not in given or "data" in given or {"-h", "--help"} & set(overrides):
        return overrides
    weights = [as_meant(one) for one in given["weights"].split(",")]
    own = [data_of_run(one) for one in weights]
    asked = f"weights={given['weights']}"
    if any(data != own[0] for data in own):
        own = [{}]
        if "data.path" not in given:
            raise ValueError(f"{asked} were not trained on one text: data=story, or data=text data.path=<a text>")
    if not own[0] and "data.path" not in given:
        raise ValueError(f"{asked} says nothing of a text: data=story, or data=text data.path=<a text>")
    path = own[0].get("path")
    if path and "data.path" not in given and not (os.path.exists(os.path.expanduser(path)) or glob.glob(path)):
        raise ValueError(
            f"data.path={path}, which {asked} was trained on, is not there (seen from {Path.cwd()}): "
            f"data.path=<where it is now>, or data=<another text>"
        )
    default = app.compose("evaluate", ["data.path=null"]).data
    brought = [
        f"++data.{key}={_as_value(value)}"
        for key, value in own[0].items()
        if key in OF_A_TEXT and f"data.{key}" not in given and (key == "path" or value != default.get(key))
    ]
    at = next(place for place, override in enumerate(overrides) if "=" in override)  # behind Hydra's own flags
    return [*overrides[:at], *brought, *overrides[at:]]


def _as_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_as_value, value))}]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def find_problems(cfg: DictConfig) -> list[str]:
    """Everything wrong with ``cfg`` that can be known without reading weights or text."""
    checked, found = app.check_sections(cfg, {"": EvaluationConfig, "data": DataConfig})
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
        ValueError: the problems of the config; weights, a text or a task that cannot be read, or do not fit together; a
            loss that is no number.
    """
    if problems := find_problems(cfg):
        raise ValueError("\n".join(problems))
    from src.device import pick_accelerator
    from src.evaluation import losses, tasks
    from src.evaluation.report import write_report
    from src.generation.text import check_vocabulary
    from src.interop.weights import build, read_weights_and_run
    from src.kernels.install import use_fast_kernels
    from src.tokenizer import gpt2_tokenizer, token_byte_counts

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
    model, weights, run = read_weights_and_run(config.weights)
    precision = config.precision or (run.get("precision") if run.get("precision") in PRECISIONS else PRECISIONS[0])
    dtype, autocast = _in_precision(precision, pick_accelerator(config.device, "device"))
    net = build(model, weights).to(autocast.device, dtype).eval()
    use_fast_kernels(net, autocast.device)
    check_vocabulary(net, tokenizer)
    _check_model(config, net)
    for task, examples in chosen.items():
        tasks.check_lengths(task.__name__, examples, tokenizer, net.config.context_length)
    own = _own_windows(run, data, sha256, config.split)
    windows = _windows(config, len(tokens), net.config.context_length, own)
    with autocast, _progress("tokens", windows.tokens) as progress:
        settings = (windows.length, config.stride, data.batch_size, token_byte_counts(tokenizer), config.surprises)
        found = losses.text_loss(net, tokens, *settings, progress, windows.starts)
    if not math.isfinite(found.loss):
        raise ValueError(f"weights={config.weights} have a loss of {found.loss}: weights=<another checkpoint>")
    result: dict[str, Any] = {
        "status": "completed",
        "weights": config.weights,
        "text": data.source,
        "split": config.split,
        "scored": windows.said,
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "uniform_loss": math.log(tokenizer.n_vocab),
        "unigram_loss": losses.unigram_loss(found.counts[: tokenizer.n_vocab], fitted_on),
        "context_length": windows.length,
        "stride": windows.stride,
        "precision": precision,
    }
    for task, examples in chosen.items():
        with autocast, _progress(task.__name__, None) as progress:
            scores = task(net, examples, tokenizer, data.batch_size, progress=progress)
        result |= {f"{task.__name__}_{key}": value for key, value in scores.items()}
    if math.isnan(result["bits_per_byte"]):  # no bytes
        del result["bits_per_byte"]
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


def _own_windows(run: dict[str, Any], data: DataConfig, sha256: str, split: str) -> tuple[int, int, int] | None:
    """Length, stride and number of the windows of ``split`` that the evaluations of ``run`` score, if ``data`` is its
    own text, cut as it was."""
    own, scored = run.get("data"), run.get("eval_windows")
    if not isinstance(own, dict) or any(
        own.get(key) != getattr(data, key) for key in ("train_ratio", "special_tokens")
    ):
        return None
    if run["data_sha256"] != sha256:
        if own.get("path") == data.path:
            log.warning("%s is no longer the text that the weights were trained on", data.source)
        return None
    length = own.get("context_length")
    stride = (own.get("stride") or length) if split == "train" else length
    count = scored.get(split) if isinstance(scored, dict) else None
    known = all(type(number) is int and number > 0 for number in (length, stride, count))
    return (length, stride, count) if known else None


class Windows(NamedTuple):
    """What is scored: whole windows of ``length`` tokens that begin at ``starts``, or (None) every token once, from
    windows ``stride`` apart; how many ``tokens`` that are, and the same in words."""

    starts: Any
    length: int
    stride: int
    tokens: int
    said: str


def _windows(config: EvaluationConfig, tokens: int, longest: int, own: tuple[int, int, int] | None) -> Windows:
    """What to score of so many ``tokens``: what ``config`` asks for, else the ``own`` windows of the run."""
    import numpy as np

    from src.data.windows import evenly_spread

    length = config.context_length or (own[0] if own else longest)
    stride, most = own[1:] if own and own[0] == length else (length, None)
    if config.max_tokens is not None:
        most = max(config.max_tokens // length, 1)
    count = len(range(0, tokens - length, stride))
    if most is None or config.max_tokens == -1 or config.stride or not count:
        stride = config.stride or length
        said = f"every token but the first, once, with up to {length:,} tokens of context"
        return Windows(None, length, stride, tokens - 1, said)
    starts = np.array(evenly_spread(count, most)) * stride
    whose = "spread over the split" if config.max_tokens else "those of the run's own evaluations"
    said = f"{len(starts):,} of {count:,} windows of {length:,} tokens, {whose}"
    return Windows(starts, length, stride, len(starts) * length, said)


def _in_precision(precision: str, device: str) -> tuple[torch.dtype, torch.autocast]:
    """The type of the weights in Lightning's ``precision``, and the context in which it computes."""
    import torch

    bits, _, kind = precision.partition("-")
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}[bits]
    mixed = kind == "mixed"
    context = torch.autocast(device, dtype if mixed else torch.bfloat16, enabled=mixed)
    return torch.float32 if mixed else dtype, context


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
    app.launch("evaluate", _run, find_problems, with_data_of_run)
