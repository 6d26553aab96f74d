"""An interrupted run, resumed, is bit-identical to one that was not; what could not be its continuation is refused."""

import csv
import itertools
import json
import random
import shutil
import signal

import pytest
import torch
from conftest import FAST, column
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import cli
from src.record import read_record
from src.resume import resumed_overrides
from src.train import find_problems
from src.training.interruption import Interrupted
from src.verify_resume import first_difference

WATCHED = ("callbacks.text_samples.max_new_tokens=3", "~callbacks.loss_plot", "eval.batches=2")
SETTINGS = {  # 12 batches an epoch of 4 windows, 2 epochs
    "plain": (),
    "accumulation": ("trainer.accumulate_grad_batches=3",),
    "uneven accumulation": ("trainer.accumulate_grad_batches=5",),
    "overlapping windows": ("data.stride=11",),
    "bounded by steps": ("trainer.max_epochs=null", "trainer.max_steps=19"),
    "few logs": ("trainer.log_every_n_steps=3",),
    "no evaluation": ("trainer.limit_val_batches=0",),
    "part of an epoch": ("trainer.limit_train_batches=5",),
    "workers": ("data.num_workers=2",),
    "bf16": ("trainer.precision=bf16-mixed",),
}


def interrupt(number: int = signal.SIGTERM):
    return lambda module: signal.raise_signal(number)


@pytest.mark.parametrize("setting", SETTINGS)
def test_interrupted_at_any_step(tiny_run, at_batch, setting, trials):
    """Dropout, shuffling, evaluation, samples and both loggers on."""
    common = (*WATCHED, "trainer.max_epochs=2", "data.batch_size=4", "eval.every_steps=4", *SETTINGS[setting])
    whole = tiny_run(*common)
    batches = whole.trainer.fit_loop.epoch_loop.total_batch_idx + 1
    draw = random.Random(setting)
    moments = [0, batches - 1, whole.trainer.num_training_batches - 1]  # the edges, then any
    moments = (moments + [draw.randrange(batches) for _ in range(10)])[: trials(2, 10)]
    for batch in moments:
        at_batch(batch, interrupt())
        with pytest.raises(Interrupted) as interrupted:
            tiny_run(*common, folder=whole.folder.with_name(f"cut{batch}"))
        assert interrupted.value.code == 143
        folder = whole.folder.with_name(f"cut{batch}")
        assert read_record(folder)["status"] == "interrupted"
        tiny_run(*common, resume=folder)
        assert first_difference(whole.folder, folder) is None, batch
        shutil.rmtree(folder)
    trials.passed("interrupted at random steps: dropout, shuffling, accumulation, workers, evaluation, samples",
                  len(moments), "bit-identical")  # fmt: skip
