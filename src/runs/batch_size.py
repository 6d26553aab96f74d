"""The batch, the accumulation and the length of a run, where its config gives tokens or asks for what fits."""

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from src.device import free_on, is_out_of_memory, pick_accelerator, pick_precision
from src.model.architectures import count_parameters
from src.runs import processes
from src.runs.plan import needed_memory
from src.training.config import TrainConfig
from src.training.step_cost import estimate_memory, measure_step

log = logging.getLogger(__name__)

NUMBERS = {"16": "16-mixed", "32": "32-true", "64": "64-true"}  # Lightning's short names of precisions


def with_batches(config: TrainConfig, world_size: int) -> TrainConfig:
    """``config`` with the batch, the accumulation and the number of steps that ``data.batch_size=auto``,
    ``tokens_per_step`` and ``tokens_per_parameter`` stand for.

    Raises:
        MemoryError: not even a batch of one window fits.
        ValueError: a number of tokens that no whole number of batches makes, or a vocabulary of unknown size.
    """
    config = with_largest_batch(config.with_window()).accumulated(world_size)
    if config.tokens_per_parameter is None:
        return config
    vocabulary = config.model.vocab_size or (config.tokenizer.size if config.data.format == "text" else None)
    if vocabulary is None:
        raise ValueError(
            f"tokens_per_parameter={config.tokens_per_parameter:g} needs the size of the vocabulary, which is not "
            f"known before the text is read; use model.vocab_size=<n>, or tokenizer=byte or gpt2 with a text"
        )
    share = config.tokens_per_parameter
    config = config.with_vocabulary(vocabulary, vocabulary_multiple(pick_accelerator(config.trainer.accelerator)))
    step = config.data.batch_size * config.context_length * config.trainer.accumulate_grad_batches * world_size
    steps = max(round(share * count_parameters(config.model) / step), 1)
    return config.changed(trainer=config.trainer.changed(max_steps=steps), tokens_per_parameter=None)


def vocabulary_multiple(device: str) -> int:
    """What the size of the vocabulary is rounded up to a multiple of: on a GPU, matrices of such sizes are faster."""
    return 64 if device == "cuda" else 1


def with_largest_batch(config: TrainConfig) -> TrainConfig:
    """``config`` with the largest ``data.batch_size`` that divides a step of ``tokens_per_step`` tokens, should fit
    into the free memory, and makes two steps in a process of its own.

    Raises:
        MemoryError: not even a batch of one window fits.
    """
    if not config.auto_batch:
        return config
    size = processes.from_rank_zero(lambda: _largest(config))
    log.info("data.batch_size=auto is %d", size)
    return config.with_batch_size(size)


def _largest(config: TrainConfig) -> int:
    world_size = processes.world_size()
    windows = config.accumulated(world_size).trainer.accumulate_grad_batches  # in batches of one
    kind, devices = pick_accelerator(config.trainer.accelerator), config.trainer.devices
    first = devices[0] if isinstance(devices, list) else 0
    device = torch.device(kind, first) if kind == "cuda" else torch.device(kind)
    precision = str(config.trainer.precision or pick_precision(kind))
    precision = NUMBERS.get(precision, precision)
    if not config.model.vocab_size:  # of a tokenizer that is made from the text
        config = config.with_vocabulary(config.tokenizer.size or 2**16)
    free = free_on(device)
    for size in range(windows, 0, -1):
        if windows % size:
            continue
        tried = config.with_batch_size(size).accumulated(world_size)
        memory = estimate_memory(tried, kind, precision)
        if free is None or sum(needed_memory(memory, kind, tried)) <= free:
            if _fits(tried, device, precision):
                return size
            log.info("data.batch_size=%d does not fit", size)
    raise MemoryError("a batch of one window does not fit")


def _fits(config: TrainConfig, device: torch.device, precision: str) -> bool:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own_process:
        try:
            own_process.submit(measure_step, config, device, precision, seconds=0).result()
        except BrokenProcessPool:  # the system killed it
            return False
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
    return True
