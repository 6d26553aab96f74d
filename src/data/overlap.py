"""How much of the validation tokens occurs in the training tokens."""

from collections.abc import Iterator

import numpy as np

from src.data.shards import ShardTokens

RUN = 50  # tokens in a row that two texts share by copying only, as in Lee et al. 2022 (arXiv:2107.06499)
MOST = 2**23  # tokens of training; these take about a second
BLOCK = 2**20  # tokens hashed at a time
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd; 2**64 divided by the golden ratio, as in Fibonacci hashing


def described_overlap(train: np.ndarray | ShardTokens, val: np.ndarray | ShardTokens, length: int) -> str:
    """:func:`overlap` in words, for at most ``MOST`` training tokens."""
    if len(train) > MOST:
        return f"compared with training up to {MOST:,} training tokens only"
    share, run = overlap(train, val, length), min(RUN, length + 1)
    return f"{share:.1%} of the windows share {run} tokens in a row with the training split"


def overlap(train: np.ndarray | ShardTokens, val: np.ndarray | ShardTokens, length: int) -> float:
    """The share of the validation windows of ``length`` tokens that have ``RUN`` tokens in a row, or all of a shorter
    window, which occur in this order in the training tokens ``(N,)``."""
    run = min(RUN, length + 1)
    wanted = np.concatenate(list(_runs(val, run)))
    table = np.zeros(2**24, dtype=bool)  # spares most of the search
    table[wanted >> np.uint64(40)] = True
    found = np.sort(np.concatenate([hashes[table[hashes >> np.uint64(40)]] for hashes in _runs(train, run)]))
    found = np.append(found, np.uint64(2**64 - 1))
    (places,) = np.nonzero(found[np.searchsorted(found, wanted)] == wanted)
    inside = places[places % length + run <= length + 1]  # a window ends with its last target
    windows = len(range(0, len(val) - length, length))
    return int(np.sum(np.unique(inside // length) < windows)) / windows


def _runs(tokens: np.ndarray | ShardTokens, run: int) -> Iterator[np.ndarray]:
    """Hashes ``(N,)`` uint64 of all sequences of ``run`` tokens, in blocks."""
    for first in range(0, len(tokens) - run + 1, BLOCK):
        hashes, width = tokens[first : first + BLOCK + run - 1].astype(np.uint64), 1
        while width < run:
            step = min(width, run - width)  # two sequences make a longer one, and may share its middle
            hashes = hashes[:-step] * MULTIPLIER + hashes[step:]
            hashes ^= hashes >> np.uint64(32)
            width += step
        yield hashes * MULTIPLIER
