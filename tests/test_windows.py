import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.windows import SeededSampler, SlidingWindowDataset


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


def test_resumed_order_goes_on_where_it_stopped():
    whole = SeededSampler(20, True, 7)
    whole.set_epoch(3)
    resumed = SeededSampler(20, True, 7)
    resumed.resume_at(3, 6)
    assert list(resumed) == list(whole)[6:]
    resumed.set_epoch(4)
    whole.set_epoch(4)
    assert list(resumed) == list(whole)
