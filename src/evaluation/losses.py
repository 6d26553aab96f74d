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
    """A token that the model did not see coming: its place in the text, its loss in nats, and what was likeliest."""

    at: int
    loss: float
    token: int
    expected: int


@dataclass
class TextLoss:
    """Sums over the tokens scored. ``by_position`` is the mean loss in nats of the targets with 1, 2, ... tokens of
    context, NaN where none was scored; ``whole_windows`` that of the windows of full length, as training evaluates."""

    total: float
    tokens: int
    bytes: int
    by_position: np.ndarray
    whole_windows: float
    surprises: list[Surprise] = field(default_factory=list)

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
) -> TextLoss:
    """Score each of ``tokens`` ``(N,)`` but the first, once.

    Windows of ``context_length`` begin ``stride`` tokens apart (None: ``context_length``), and of each only those
    targets count that no earlier window had; so a smaller stride gives each token at least ``context_length - stride``
    tokens of context, at a higher price. The last window may be shorter. ``byte_counts`` ``(n_vocab,)`` are the
    bytes per token.

    Raises:
        ValueError: fewer than two tokens, or a stride above ``context_length``.
    """
    stride = stride or context_length
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, one is scored by those before it: data.path=<more text>")
    if stride > context_length:
        raise ValueError(f"stride={stride} would leave tokens out between windows: stride={context_length}")
    device = net.tok_emb.weight.device
    sums, counts = np.zeros(context_length), np.zeros(context_length, dtype=np.int64)
    whole_sum = whole_count = scored_bytes = 0
    worst: list[Surprise] = []
    with evaluating(net):
        for starts, length, scored in _batches(len(tokens), context_length, stride, batch_size):
            rows = torch.from_numpy(np.stack([tokens[s : s + length + 1].astype(np.int64) for s in starts])).to(device)
            logits = net(rows[:, :-1])  # (B, T, V)
            targets = rows[:, 1:]  # (B, T)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
            counted = losses[:, -scored:].cpu().double().numpy()  # (B, scored)
            sums[length - scored : length] += counted.sum(axis=0)
            counts[length - scored : length] += len(starts)
            if length == context_length and stride == context_length:
                whole_sum, whole_count = whole_sum + counted.sum(), whole_count + counted.size
            if byte_counts is not None:
                scored_bytes += int(byte_counts[targets[:, -scored:].cpu().numpy()].sum())
            if surprises:
                worst = sorted(
                    worst + _worst(losses, logits, targets, starts, scored, surprises), key=lambda s: -s.loss
                )
                del worst[surprises:]
            progress(counted.size)
    means = np.divide(sums, counts, out=np.full(context_length, np.nan), where=counts > 0)
    whole = whole_sum / whole_count if whole_count else math.nan
    return TextLoss(sums.sum(), int(counts.sum()), scored_bytes, means, whole, worst)


def _batches(count: int, length: int, stride: int, batch_size: int) -> Iterator[tuple[Sequence[int], int, int]]:
    """Starts of windows, the number of targets in each, and how many of these, the last ones, count."""
    starts = range(0, count - length, stride)
    alone = 0 if stride == length else 1  # of the first window more targets count than of those behind it
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
        expected = logits[row, column].argmax().item()
        found.append(Surprise(starts[row] + column + 1, loss, targets[row, column].item(), expected))
    return found


def unigram_loss(tokens: np.ndarray, fitted_on: np.ndarray, vocab_size: int) -> float:
    """Loss in nats per token of all of ``tokens`` but the first under the frequencies in ``fitted_on``, with one
    added to each of the ``vocab_size`` counts (Laplace)."""
    counts = _counts(fitted_on, 0, vocab_size) + 1.0
    targets = _counts(tokens, 1, vocab_size)
    return float(-(targets * np.log(counts / counts.sum())).sum() / targets.sum())


def _counts(tokens: np.ndarray, first: int, vocab_size: int) -> np.ndarray:
    """How often each id occurs from ``first`` on; block by block, for tokens may be more than fit in memory."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(first, len(tokens), 2**20):
        counts += np.bincount(tokens[start : min(start + 2**20, len(tokens))], minlength=vocab_size)
    return counts
