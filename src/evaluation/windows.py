"""Which windows of a text are scored."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from src.data.config import DataConfig
from src.data.windows import evenly_spread
from src.evaluation.config import EvaluationConfig

log = logging.getLogger(__name__)


class RunWindows(NamedTuple):
    """The windows that the evaluations of a run score: their length, stride and number."""

    length: int
    stride: int
    number: int
    spared: int = 0  # tokens at the end of the split that leave room for shifted windows


class Windows(NamedTuple):
    """What is scored: the whole windows of ``length`` tokens at ``starts``, or, if these are None, every token but the
    first, once, from windows ``stride`` apart. ``tokens`` is the number of tokens scored."""

    starts: Sequence[int] | None
    length: int
    stride: int
    tokens: int
    description: str


def windows_of_run(run: dict[str, Any], data: DataConfig, sha256: str, split: str) -> RunWindows | None:
    """The windows of ``split`` that the evaluations of ``run`` score; None unless ``data``, whose hash is ``sha256``,
    is the run's own text and split in the same way. ``run`` is what a checkpoint says of its run."""
    own, counts = run.get("data"), run.get("eval_windows")
    if not isinstance(own, dict) or not isinstance(counts, dict):
        return None
    if any(own.get(key) != getattr(data, key) for key in ("train_ratio", "special_tokens")):
        return None
    if run["data_sha256"] != sha256:
        if own.get("path") == data.path:
            log.warning("%s is no longer the text that the weights were trained on", data.source)
        return None
    length = own.get("context_length")
    stride = (own.get("stride") or length) if split == "train" else length
    found = [number for number in (length, stride, counts.get(split)) if type(number) is int and number > 0]
    if len(found) < 3:
        return None
    return RunWindows(*found[:3], spared=found[1] - 1 if split == "train" and own.get("shift") else 0)


def choose_windows(config: EvaluationConfig, tokens: int, longest: int, own: RunWindows | None) -> Windows:
    """The windows that ``config`` asks for in a text of so many ``tokens``; by default those of the weights' ``own``
    run. ``longest`` is the model's context length.

    Raises:
        ValueError: windows longer than the model's context.
    """
    if (config.context_length or 0) > longest:
        raise ValueError(
            f"context_length={config.context_length} is more than the model's {longest}; use context_length={longest}"
        )
    length = config.context_length or (own.length if own else longest)
    stride, most = (own.stride, own.number) if own and own.length == length else (length, None)
    if config.max_tokens is not None:
        most = max(config.max_tokens // length, 1)
    count = len(range(0, tokens - length - (own.spared if most is not None and own else 0), stride))
    if most is None or config.max_tokens == -1 or config.stride or not count:
        description = f"every token but the first, once, with up to {length:,} tokens of context"
        return Windows(None, length, config.stride or length, tokens - 1, description)
    starts = [place * stride for place in evenly_spread(count, most)]
    origin = "spread over the split" if config.max_tokens else "those of the run's own evaluations"
    description = f"{len(starts):,} of {count:,} windows of {length:,} tokens, {origin}"
    return Windows(starts, length, stride, len(starts) * length, description)
