"""Measure how good a model is: ``python -m src.evaluate weights=<x> [overrides]``. See ``conf/evaluate.yaml``."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.cli import app
from src.cli.text_of_run import with_data_of_run
from src.cli.typed import typed
from src.config import problems_of, refuse
from src.evaluation.config import PRECISIONS, EvaluationConfig, problems_of_tasks
from src.files import write_json
from src.interop.locate import locate
from src.runs.record import git_revision, versions

if TYPE_CHECKING:  # a wrong command line is answered without the seconds that these imports take
    import tiktoken

    from src.data.config import DataConfig

log = logging.getLogger(__name__)


def check(cfg: DictConfig) -> EvaluationConfig:
    """``cfg`` as a frozen config.

    Raises:
        ValueError: every problem that can be found without reading weights, text or tasks, one per line.
    """
    config = typed(cfg, EvaluationConfig)
    refuse([*problems_of(locate, config.weights), *problems_of_tasks(config.tasks, config.tasks_path)])
    return config


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluate as ``cfg`` says and leave ``evaluation.json``, ``surprises.md`` and ``plots`` in ``folder``; the content
    of the first is returned.

    Raises:
        ValueError: the problems of the config, all at once; weights, a text or a task that cannot be read, or that do
            not fit each other; a loss that is not finite.
    """
    config = check(cfg)
    from src.data.progress import progress
    from src.device import in_precision, pick_accelerator
    from src.evaluation.losses import text_loss, unigram_loss
    from src.evaluation.report import write_report
    from src.evaluation.windows import choose_windows, windows_of_run
    from src.generation.text import check_vocabulary
    from src.interop.weights import build, read_model
    from src.kernels.install import use_fast_kernels
    from src.tokenizer import token_byte_counts
    from src.tokenizer.encoding import unknown_tokens

    started = time.perf_counter()
    tasks = None
    if config.tasks:  # lm-eval takes seconds to import, and may not be installed
        from src.evaluation.tasks import load_tasks

        tasks = load_tasks(config.tasks, config.tasks_path)
    model, weights, tokenizer, run = read_model(config.weights)
    tokens, train, sha256 = _read_text(config.data, config.split, tokenizer)
    precision = config.precision or (run["precision"] if run.get("precision") in PRECISIONS else "32-true")
    device = pick_accelerator(config.device, "device")
    dtype, autocast = in_precision(precision, device)
    net = build(model, weights).to(device, dtype).eval()
    use_fast_kernels(net, device)
    check_vocabulary(net, tokenizer)
    own = windows_of_run(run, config.data, sha256, config.split)
    windows = choose_windows(config, len(tokens), net.config.context_length, own)
    with autocast, progress("scoring", windows.tokens, "tokens") as advance:
        settings = (windows.length, windows.stride, config.data.batch_size, token_byte_counts(tokenizer))
        found = text_loss(net, tokens, *settings, config.surprises, advance, windows.starts)
    if unknown := unknown_tokens(tokens, tokenizer):
        counts = f"{unknown:,} of the {len(tokens):,} characters"
        log.warning("%s are not in the tokenizer %s, and are read as U+FFFD", counts, tokenizer.name)
    if not math.isfinite(found.loss):
        raise ValueError(f"weights={config.weights} have a loss of {found.loss}; use weights=<another checkpoint>")
    result = {
        "status": "completed",
        "weights": config.weights,
        "text": config.data.source,
        "split": config.split,
        "tokenizer": tokenizer.name,
        "scored": windows.description,
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        **({"bits_per_byte": found.bits_per_byte} if found.bytes and not unknown else {}),
        "uniform_loss": math.log(tokenizer.n_vocab),
        "unigram_loss": unigram_loss(found.counts[: tokenizer.n_vocab], train),
        "context_length": windows.length,
        "stride": windows.stride,
        "precision": precision,
    }
    if tasks:
        from src.evaluation.harness import HarnessLM
        from src.evaluation.tasks import run_tasks

        with autocast:
            adapter = HarnessLM(net, tokenizer, config.data.batch_size, config.seed)
            result |= run_tasks(tasks, adapter, config.tasks_limit)
    for key, value in result.items():
        log.info("%-30s  %s", key.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else value)
    write_report(found, tokens, tokenizer, folder)
    result |= {
        "loss_by_position": [None if math.isnan(value) else value for value in found.by_position.tolist()],
        "data_sha256": sha256,
        "config": config.model_dump(mode="json"),
        "versions": versions() | ({"lm_eval": importlib.metadata.version("lm_eval")} if tasks else {}),
        "git": git_revision(),
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / "evaluation.json", result)
    log.info("evaluation folder: %s", folder)
    return result


def _read_text(data: DataConfig, split: str, tokenizer: tiktoken.Encoding) -> tuple[Any, Any, str]:
    """The tokens to score, those that the unigram baseline is fitted on, and the hash of the text."""
    from src.data.tokens import read_split

    found = read_split(data, tokenizer, 1.0 if split == "all" else data.train_ratio)
    return (found.val if split == "val" else found.train), found.train, found.sha256


def _run(cfg: DictConfig) -> float:
    """One Hydra job; its objective is the loss."""
    return evaluate(cfg, Path(HydraConfig.get().runtime.output_dir))["loss"]


if __name__ == "__main__":
    app.launch("evaluate", _run, check, with_data_of_run)
