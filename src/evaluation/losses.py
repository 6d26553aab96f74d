"""The loss of every token of a text."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from src.generation.decode import evaluating
from src.model.gpt import GPT


class Surprise(NamedTuple):
    """A token with a high loss: its position in the text, its loss in nats, its id, and the likeliest token instead."""

    at: int
    loss: float
    token: int
    expected: int


@dataclass
class TextLoss:
    """Sums over the tokens scored. ``total`` is in nats. ``by_position`` is the mean loss of the targets with 1, 2, ...
    tokens of context, NaN where none was scored. ``counts`` ``(V,)`` is how often each token was scored."""

    total: float
    bytes: int
    by_position: np.ndarray
    counts: np.ndarray
    surprises: list[Surprise] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float:
        return self.total / math.log(2) / self.bytes if self.bytes else math.nan


def text_loss(
    net: GPT,
    tokens: np.ndarray,
    context_length: int,
    stride: int | None = None,
    batch_size: int = 2,
    byte_counts: np.ndarray | None = None,
    surprises: int = 0,
    progress: Callable[[int], None] = lambda scored: None,
    starts: Sequence[int] | None = None,
) -> TextLoss:
    """Score each of ``tokens`` ``(N,)`` but the first, once; or all targets of the whole windows at ``starts``.

    Windows of ``context_length`` begin ``stride`` tokens apart (None: ``context_length``). A window counts only the
    targets that no earlier window had, so a smaller stride gives each token at least ``context_length - stride`` tokens
    of context, at a higher cost. The last window may be shorter. ``byte_counts`` ``(n_vocab,)`` are the bytes per
    token, and ``surprises`` is the number of tokens with the highest loss to return.

    Raises:
        ValueError: fewer than two tokens, or a stride above ``context_length``.
    """
    stride = stride or context_length
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, scoring needs at least 2; use data.path=<more text>")
    if stride > context_length:
        raise ValueError(f"stride={stride} would leave out tokens between windows; use stride={context_length}")
    device = net.tok_emb.weight.device
    sums, at_position = np.zeros(context_length), np.zeros(context_length, dtype=np.int64)
    counts, scored_bytes = np.zeros(net.config.vocab_size, dtype=np.int64), 0
    if starts is None:
        batches = _batches(len(tokens), context_length, stride, batch_size)
    else:
        chunks = (starts[first : first + batch_size] for first in range(0, len(starts), batch_size))
        batches = ((chunk, context_length, context_length) for chunk in chunks)
    worst: list[Surprise] = []
    with evaluating(net):
        for begin, length, scored in batches:
            rows = torch.from_numpy(np.stack([tokens[s : s + length + 1].astype(np.int64) for s in begin])).to(device)
            logits = net(rows[:, :-1])  # (B, T, V)
            targets = rows[:, 1:]  # (B, T)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
            counted = losses[:, -scored:].cpu().double().numpy()  # (B, scored)
            sums[length - scored : length] += counted.sum(axis=0)
            at_position[length - scored : length] += len(begin)
            seen = targets[:, -scored:].cpu().numpy()
            counts += np.bincount(seen.ravel(), minlength=len(counts))
            if byte_counts is not None:
                scored_bytes += int(byte_counts[seen].sum())
            if surprises:
                worst = sorted(worst + _worst(losses, logits, targets, begin, scored, surprises), key=lambda s: -s.loss)
                del worst[surprises:]
            progress(counted.size)
    means = np.divide(sums, at_position, out=np.full(context_length, np.nan), where=at_position > 0)
    return TextLoss(sums.sum(), scored_bytes, means, counts, worst)


def _batches(count: int, length: int, stride: int, batch_size: int) -> Iterator[tuple[Sequence[int], int, int]]:
    """Starts of windows, the number of targets in each, and how many of these count, from the end of the window."""
    starts = range(0, count - length, stride)
    alone = 0 if stride == length else 1  # the first window counts more targets than those after it
    if starts[:alone]:
        yield starts[:alone], length, length
    for first in range(alone, len(starts), batch_size):
        yield starts[first : first + batch_size], length, stride
    done = starts[-1] + length if starts else 0
    if done < count - 1:
        start = len(starts) * stride
        yield [start], count - 1 - start, count - 1 - done


def _worst(
    losses: Tensor, logits: Tensor, targets: Tensor, starts: Sequence[int], scored: int, number: int
) -> list[Surprise]:
    counted = losses[:, -scored:]  # (B, scored)
    first = losses.shape[1] - scored
    top = counted.flatten().topk(min(number, counted.numel()))
    found = []
    for loss, at in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        row, column = divmod(at, scored)
        column += first
        token, expected = int(targets[row, column]), int(logits[row, column].argmax())
        found.append(Surprise(starts[row] + column + 1, loss, token, expected))
    return found


def unigram_loss(scored: np.ndarray, fitted_on: np.ndarray) -> float:
    """Loss in nats per token of a model that knows only how often each token occurs in ``fitted_on`` ``(N,)``, with one
    added to each count (Laplace smoothing). ``scored`` ``(V,)`` counts the tokens that it is applied to."""
    counts = np.ones(len(scored))
    for start in range(0, len(fitted_on), 2**20):  # it may not fit in memory
        counts += np.bincount(fitted_on[start : min(start + 2**20, len(fitted_on))], minlength=len(scored))
    return float(-(scored * np.log(counts / counts.sum())).sum() / scored.sum())
