"""Sliding windows over a flat array of tokens, and the order in which they are trained on."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

ROUNDS = 16  # of the Feistel network; even, so that it ends in the grid it began in
BLOCK = 2**14  # indices computed at a time
NOT_COUNTED = -100  # as a target: cross-entropy leaves it out


class SlidingWindowDataset(Dataset):
    """The windows that start at ``range(0, len(tokens) - context_length, stride)``.

    Window ``i`` is the slice ``tokens[i * stride : i * stride + context_length + 1]``, given as a pair of inputs and
    targets one step apart, each ``(context_length,)`` int64. Nothing is copied before a window is asked for, so the
    windows take no memory beyond the tokens, whatever the stride. ``tokens`` is any one-dimensional array of integers,
    a memory map included, or whatever else has a length and gives arrays as slices, as shards do.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, stride: int) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.stride = stride

    def __len__(self) -> int:
        return len(range(0, len(self.tokens) - self.context_length, self.stride))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index % len(self) * self.stride
        window = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]


def evenly_spread(count: int, most: int | None) -> Sequence[int]:
    """At most ``most`` of ``range(count)``, at equal distances over all of it; None: all."""
    return range(count) if most is None or most >= count else [place * count // most for place in range(most)]


class SeededSampler(Sampler[int]):
    """Indices ``0 .. length - 1`` in an order that is a function of ``(seed, epoch)`` alone.

    An epoch has a multiple of ``multiple`` indices; which are left over depends on its order. Lightning calls
    ``set_epoch``; ``resume_at`` names the epoch and the number of indices of it that an earlier process has already
    given out.
    """

    def __init__(self, length: int, shuffle: bool, seed: int, multiple: int = 1) -> None:
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.multiple = multiple
        self.epoch = 0
        self._resumed = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume_at(self, epoch: int, given_out: int) -> None:
        self.epoch = epoch
        self._resumed = (epoch, given_out)

    def __len__(self) -> int:
        return self.length // self.multiple * self.multiple

    def __iter__(self) -> Iterator[int]:
        epoch, given_out = self._resumed
        first = given_out if self.epoch == epoch else 0
        if not self.shuffle:
            return iter(range(first, len(self)))
        keys = np.random.SeedSequence([self.seed, self.epoch]).generate_state(ROUNDS, np.uint64)
        return islice(shuffled(self.length, keys, first), max(len(self) - first, 0))


def shuffled(length: int, keys: np.ndarray, first: int = 0) -> Iterator[int]:
    """The numbers ``0 .. length - 1`` in an order that depends on ``keys`` ``(ROUNDS,)`` uint64, from place ``first``
    on; neither where it starts nor the length costs anything beforehand."""
    for start in range(first, length, BLOCK):
        places = np.arange(start, min(start + BLOCK, length), dtype=np.uint64)
        yield from permuted(places, length, keys).tolist()


def permuted(places: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """What stands at ``places``, uint64 below ``length``, in a permutation of ``range(length)`` chosen by ``keys``.

    A Feistel network over a grid of just over ``length`` cells, passed again by what left ``range(length)`` (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 4 and 5).
    """
    columns = math.isqrt(max(length - 1, 0)) + 1
    rows = -(-length // columns)
    found = places.copy()
    outside = np.ones(len(places), dtype=bool)
    while outside.any():
        left, right = found[outside] % np.uint64(columns), found[outside] // np.uint64(columns)
        for number, key in enumerate(keys):
            modulus = np.uint64(rows if number % 2 else columns)
            left, right = right, (left + _scrambled(right ^ key) % modulus) % modulus
        found[outside] = right * np.uint64(columns) + left
        outside = found >= length
    return found


def _scrambled(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing of 64 bits (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators")."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class RankSampler(Sampler[int]):
    """What one of ``ranks`` processes trains on: the ``rank``-th share of every ``ranks * batch_size`` indices that
    ``sampler`` gives out, whose number is a multiple of that. The order as a whole is the same for any number of
    processes.
    """

    def __init__(self, sampler: SeededSampler, batch_size: int, rank: int, ranks: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.ranks

    def __iter__(self) -> Iterator[int]:
        indices, whole = iter(self.sampler), self.batch_size * self.ranks
        while batch := list(islice(indices, whole)):
            yield from batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


class RankWindows(Dataset):
    """What one of ``ranks`` processes evaluates: of every ``ranks * batch_size`` of ``windows``, the ``rank``-th share.

    A process that has no share in the last of these batches gets one window whose targets are all
    :data:`NOT_COUNTED`, so that all have the same number of batches, and each window counts once.
    """

    def __init__(self, windows: Dataset, batch_size: int, rank: int, ranks: int) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        before, last = divmod(len(self.windows) - 1, self.batch_size * self.ranks)
        share = last + 1 - self.rank * self.batch_size
        return before * self.batch_size + min(max(share, 1), self.batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch, within = divmod(index, self.batch_size)
        place = (batch * self.ranks + self.rank) * self.batch_size + within
        if place < len(self.windows):
            return self.windows[place]
        inputs, targets = self.windows[0]
        return inputs, torch.full_like(targets, NOT_COUNTED)
