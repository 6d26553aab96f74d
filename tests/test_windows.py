import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.windows import BLOCK, ROUNDS, SeededSampler, SlidingWindowDataset, permuted


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 15))
def test_windows_are_the_books(length, context_length, stride):
    tokens = np.arange(length, dtype=np.uint16)
    windows = SlidingWindowDataset(tokens, context_length, stride)
    expected = [
        (list(range(start, start + context_length)), list(range(start + 1, start + context_length + 1)))
        for start in range(0, length - context_length, stride)
    ]
    assert [(inputs.tolist(), targets.tolist()) for inputs, targets in windows] == expected
    assert len(windows) == len(expected)


def test_only_existing_windows():
    windows = SlidingWindowDataset(np.arange(10), 3, 2)
    assert windows[-1][0].tolist() == windows[len(windows) - 1][0].tolist()
    for index in len(windows), -len(windows) - 1:
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize("stride", [1, 7, 1024])
def test_windows_take_no_memory_beyond_two_bytes_a_token(stride):
    tokens = np.zeros(4_000_000, dtype=np.uint16)
    tracemalloc.start()
    windows = SlidingWindowDataset(tokens, 1024, stride)
    for index in range(0, len(windows), len(windows) // 100 + 1):
        assert windows[index][0].shape == (1024,)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert windows.tokens.nbytes == 2 * len(tokens)
    assert np.shares_memory(windows.tokens, tokens)
    assert peak < 100_000  # one window at a time, nothing kept


def test_memory_map_stays_a_memory_map(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    windows = SlidingWindowDataset(mapped, 10, 10)
    assert np.shares_memory(windows.tokens, mapped)
    assert windows[3][1].tolist() == list(range(31, 41))


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = SeededSampler(50, True, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(order(1, 2)) == list(range(50))
    assert list(SeededSampler(5, False, 1)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 18, 99, 1000, BLOCK, BLOCK + 1, 2**20 + 1])
def test_order_is_a_permutation(length):
    sampler = SeededSampler(length, True, 5)
    order = list(sampler)
    assert sorted(order) == list(range(length))
    sampler.set_epoch(1)
    again = list(sampler)
    assert sorted(again) == list(range(length))
    assert length < 18 or sum(a == b for a, b in zip(order, again, strict=True)) < 9
    assert list(SeededSampler(length, True, 5, epoch=1, done=length // 3)) == again[length // 3 :]


@given(st.integers(1, 2**62), st.lists(st.integers(0, 2**64 - 1), min_size=ROUNDS, max_size=ROUNDS), st.data())
def test_places_of_any_length_keep_apart(length, keys, data):
    places = data.draw(st.sets(st.integers(0, length - 1), min_size=min(length, 9), max_size=50))
    found = permuted(np.array(sorted(places), dtype=np.uint64), length, np.array(keys, dtype=np.uint64))
    assert len(set(found.tolist())) == len(places)
    assert found.max() < length


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_is_equally_likely(length):
    """Chi-square over all permutations; 5 standard deviations, drawn from fixed seeds."""
    trials = 100 * math.factorial(length)
    counts = dict.fromkeys(itertools.permutations(range(length)), 0)
    for epoch in range(trials):
        sampler = SeededSampler(length, True, 11)
        sampler.set_epoch(epoch)
        counts[tuple(sampler)] += 1
    freedom = len(counts) - 1
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < freedom + 5 * math.sqrt(2 * freedom)


def test_order_is_even_and_without_pattern():
    """Where the windows of each hundredth of a million go, and what follows upon what."""
    order = np.array(list(SeededSampler(10**6, True, 3)))
    boxes = np.histogram2d(np.arange(10**6), order, bins=100)[0]
    assert abs(((boxes - 100) ** 2 / 100).sum() - 99**2) < 5 * math.sqrt(2) * 99
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5e-3
    assert (np.abs(np.diff(order)) == 1).sum() < 15


def test_an_order_of_any_length_begins_anywhere_at_once():
    first = next(iter(SeededSampler(10**15, True, 1, done=9 * 10**14)))
    assert 0 <= first < 10**15
    assert next(iter(SeededSampler(10**15, True, 1))) != first


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_shifted_windows_start_elsewhere_in_each_epoch(stride):
    tokens = np.arange(60, dtype=np.uint16)
    windows = SlidingWindowDataset(tokens, 8, stride, shifts=stride)
    offsets = set()
    for epoch in range(60):
        sampler = SeededSampler(len(windows), True, 7, epoch=epoch, shifts=stride)
        starts = sorted(int(windows[index][0][0]) for index in sampler)
        offsets.add(offset := starts[0])
        assert starts == list(range(offset, offset + stride * len(windows), stride))
        assert all(windows.start(index) == windows[index][0][0] for index in sampler)
        assert list(SeededSampler(len(windows), True, 7, epoch=epoch, done=3, shifts=stride)) == list(sampler)[3:]
        assert epoch or offset == 0
    assert offsets == set(range(stride))
    with pytest.raises(IndexError):
        windows[len(windows) * stride]


def test_resumed_order_goes_on_where_it_stopped():
    whole = SeededSampler(20, True, 7)
    whole.set_epoch(3)
    resumed = SeededSampler(20, True, 7, epoch=3, done=6)
    assert list(resumed) == list(whole)[6:]
    resumed.set_epoch(4)
    whole.set_epoch(4)
    assert list(resumed) == list(whole)
