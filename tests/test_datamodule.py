import re

import pytest
import torch
from conftest import story_of

from src.data.datamodule import TextDataModule
from src.tokenizer import encode


@pytest.fixture
def make(tmp_path, letters):
    def make(text: str = "abcdefghij" * 20, **config) -> TextDataModule:
        path = tmp_path / "text.txt"
        path.write_text(text)
        data = TextDataModule(path=str(path), tokenizer=letters, **{"context_length": 8, **config})
        data.setup()
        return data

    return make


def test_splits_are_the_books(tmp_path):
    text = story_of(700)
    path = tmp_path / "text.txt"
    path.write_text(text)
    data = TextDataModule(path=str(path), context_length=16, batch_size=2, train_ratio=0.8)
    data.setup()
    cut = int(0.8 * len(text))
    assert data.train_windows.tokens.tolist() == encode(text[:cut]).tolist()
    assert data.val_windows.tokens.tolist() == encode(text[cut:]).tolist()


def test_batches_are_pairs_one_step_apart(make):
    data = make(batch_size=3, shuffle=False)
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (3, 8)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[1].tolist()).decode() == "ijabcdef"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_drops_the_rest_and_evaluation_keeps_it(make, num_workers):
    data = make(batch_size=4, num_workers=num_workers)  # 22 training windows, 2 of validation
    assert [len(inputs) for inputs, _ in data.train_dataloader()] == [4] * 5
    val, train = data.val_dataloader()
    assert [len(inputs) for inputs, _ in val] == [2]
    assert [len(inputs) for inputs, _ in train] == [2]  # as many windows as of the validation split


def test_every_epoch_sees_each_window_once_in_its_own_order(make):
    data = make(text=story_of(100), batch_size=1)
    loader = data.train_dataloader()
    epochs = []
    for epoch in 0, 1:
        loader.sampler.set_epoch(epoch)
        epochs.append([tuple(inputs[0].tolist()) for inputs, _ in loader])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def starts(loader):
    return [start for inputs, _ in loader for start in inputs[:, 0].tolist()]


def test_every_evaluation_scores_the_same_windows_spread_over_the_split(make):
    text = "".join(chr(33 + i // 8 % 90) for i in range(2000))
    data = make(text=text, batch_size=2, eval_tokens=5 * 8 + 7)  # 24 windows of validation
    val, train = data.val_dataloader()
    assert [len(chosen) for chosen in data.evaluated_windows()] == [5, 5]
    assert (
        starts(val) == starts(data.val_dataloader()[0]) == [data.val_windows[i][0][0].item() for i in (0, 4, 9, 14, 19)]
    )
    assert starts(train) == [data.train_windows[i * 224 // 5][0][0].item() for i in range(5)]
    assert [len(chosen) for chosen in make(text=text).evaluated_windows()] == [24, 24]
    assert [len(chosen) for chosen in make(text=text, eval_batches=15).evaluated_windows()] == [24, 30]


def test_epoch_is_a_whole_number_of_steps_and_leaves_out_other_windows_each_time(make):
    data = make(text=story_of(100), batch_size=2, accumulate=3)
    loader = data.train_dataloader()
    windows, left_over = len(data.train_windows), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        given = list(loader.sampler)
        assert len(given) == windows // 6 * 6 == len(loader) * 2 != windows
        left_over.append(set(range(windows)) - set(given))
    assert len(set(map(frozenset, left_over))) == 3


def test_stride_overlaps_training_windows_only(make):
    data = make(stride=2)
    assert len(data.train_windows) == len(range(0, 180 - 8, 2))
    assert len(data.val_windows) == len(range(0, 20 - 8, 8))
    assert "seen 3.82 times per epoch" in data.summary()["train"]  # 86 windows of 8 out of 180 tokens


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"context_length": 32},
            "20 validation tokens, one window needs context_length + 1 = 33; use model.context_length=19 "
            "(with weights, data.context_length=19) or more text",
        ),
        ({"context_length": 500}, "has 180 training tokens and 20 validation tokens"),
        ({"batch_size": 30}, "data.batch_size=30 is more than the 22 training windows"),
        (
            {"batch_size": 12, "rank": 1, "world_size": 2},
            "data.batch_size=12 on 2 devices is more than the 22 training windows of",
        ),
        ({"world_size": 23}, "use trainer.devices=22, a smaller"),
        ({"batch_size": 4, "accumulate": 6}, "trainer.accumulate_grad_batches=6 is more than the 22 training windows"),
        ({"train_ratio": 0.001}, "has 0 training tokens"),
    ],
)
def test_too_short_a_text_says_what_would_fit(make, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**config)


def test_what_is_said_to_fit_fits(make):
    assert len(make(context_length=19).val_windows) == 1


def test_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        TextDataModule(batch_size=0, stride=0, train_ratio=1.5, num_workers=-1, special_tokens="drop")
    assert len(str(error.value).splitlines()) == 5
