"""Sliding windows over a flat array of tokens, and the order in which they are trained on."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset

from src.data.shards import ShardTokens

ROUNDS = 16  # of the Feistel network; even, so that rows and columns end up as they began
BLOCK = 2**14  # indices computed at a time
NOT_COUNTED = -100  # the ignore index of cross-entropy


class SlidingWindowDataset(Dataset):
    """The windows that start at ``range(0, len(tokens) - context_length, stride)``.

    Window ``i`` is the slice ``tokens[i * stride : i * stride + context_length + 1]``, as a pair of inputs and targets
    one step apart, each ``(context_length,)`` int64. With ``shifts``, index ``i + k * len(self)`` is window ``i``
    shifted by ``k < shifts`` tokens, and only windows that can be shifted so far count. A window is copied when it is
    read, so windows take no memory beyond the tokens, whatever the stride. ``tokens`` is a one-dimensional array of
    integers, a memory map, or anything that has a length and whose slices are arrays, such as shards.
    """

    def __init__(self, tokens: np.ndarray | ShardTokens, context_length: int, stride: int, shifts: int = 1) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.stride = stride
        self.shifts = shifts

    def __len__(self) -> int:
        return len(range(0, len(self.tokens) - self.context_length - self.shifts + 1, self.stride))

    def start(self, index: int) -> int:
        """The place in the tokens where a window starts."""
        shift, window = divmod(index, len(self))
        return window * self.stride + shift

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self) * self.shifts:
            raise IndexError(f"window {index} of {len(self)}")
        start = self.start(index if index >= 0 else index + len(self))
        window = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]


def evenly_spread(count: int, most: int | None) -> Sequence[int]:
    """At most ``most`` of ``range(count)``, evenly spaced; all of them if ``most`` is None."""
    return range(count) if most is None or most >= count else [place * count // most for place in range(most)]


class SeededSampler(Sampler[int]):
    """Indices ``0 .. length - 1`` in an order that is a function of ``(seed, epoch)`` alone.

    The number of indices in an epoch is a multiple of ``multiple``. The rest is left out, a different one each epoch.
    From the second epoch on, the windows are shifted by less than ``shifts`` tokens, by as many in the whole epoch.
    A resumed sampler starts in ``epoch`` without its first ``done`` indices. Lightning calls ``set_epoch``.
    """

    def __init__(
        self, length: int, shuffle: bool, seed: int, multiple: int = 1, epoch: int = 0, done: int = 0, shifts: int = 1
    ) -> None:
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.multiple = multiple
        self.epoch = epoch
        self.shifts = shifts
        self._start = (epoch, done)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.multiple * self.multiple

    def __iter__(self) -> Iterator[int]:
        epoch, done = self._start
        first = done if self.epoch == epoch else 0
        keys = np.random.SeedSequence([self.seed, self.epoch]).generate_state(ROUNDS + 1, np.uint64)
        shift = int(keys[ROUNDS] % self.shifts) * self.length if self.epoch else 0
        if not self.shuffle:
            return iter(range(first + shift, len(self) + shift))
        order = shuffled(self.length, keys[:ROUNDS], first)
        return (index + shift for index in islice(order, max(len(self) - first, 0)))


def shuffled(length: int, keys: np.ndarray, first: int = 0) -> Iterator[int]:
    """The numbers ``0 .. length - 1`` in an order that depends on ``keys`` ``(ROUNDS,)`` uint64, from place ``first``
    on. Neither ``first`` nor ``length`` costs time or memory beforehand."""
    for start in range(first, length, BLOCK):
        places = np.arange(start, min(start + BLOCK, length), dtype=np.uint64)
        yield from permuted(places, length, keys).tolist()


def permuted(places: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """The numbers at ``places``, uint64 below ``length``, of a permutation of ``range(length)`` chosen by ``keys``.

    A Feistel network over a grid of just over ``length`` cells, applied again to results outside ``range(length)``
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 4 and 5).
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
    """The indices that rank ``rank`` of ``ranks`` trains on: its share of every ``ranks * batch_size`` indices of
    ``sampler``, whose length is a multiple of that. The order over all ranks does not depend on their number.
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
    """The windows that rank ``rank`` of ``ranks`` evaluates: its share of every ``ranks * batch_size`` of ``windows``.

    A rank without a share of the last of these batches gets one window whose targets are all :data:`NOT_COUNTED`. So
    all ranks have the same number of batches, and each window counts once.
    """

    def __init__(self, windows: Subset[tuple[Tensor, Tensor]], batch_size: int, rank: int, ranks: int) -> None:
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
