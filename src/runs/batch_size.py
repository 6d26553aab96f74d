"""``data.batch_size=auto``: the largest batch whose training step fits into memory."""

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from src.device import is_out_of_memory, pick_accelerator, pick_precision
from src.runs import processes
from src.runs.plan import free_on, needed_memory
from src.training.config import TrainConfig
from src.training.trial import forecast_memory, measure_step

log = logging.getLogger(__name__)


def with_largest_batch(config: TrainConfig) -> TrainConfig:
    """``config`` with the largest ``data.batch_size`` that divides a step of ``tokens_per_step`` tokens, is forecast to
    fit into the free memory, and makes two steps in a process of its own.

    Raises:
        MemoryError: not even a batch of one window fits.
    """
    if not config.auto_batch:
        return config
    size = processes.from_rank_zero(lambda: _largest(config))
    log.info("data.batch_size=auto is %d", size)
    return config.with_batch_size(size)


def _largest(config: TrainConfig) -> int:
    device = pick_accelerator(config.trainer.accelerator)
    precision = str(config.trainer.precision or pick_precision(device))
    if not config.model.vocab_size:  # of a tokenizer that is made from the text
        config = config.with_vocabulary(config.tokenizer.size or 2**16)
    assert config.tokens_per_step is not None
    windows = config.tokens_per_step // (config.context_length * processes.world_size())
    free = free_on(torch.device(device))
    for size in range(windows, 0, -1):
        if windows % size:
            continue
        tried = config.with_batch_size(size)
        if free is None or needed_memory(forecast_memory(tried, device, precision), device) <= free:
            if _fits(tried, device, precision):
                return size
            log.info("data.batch_size=%d does not fit", size)
    raise MemoryError("a batch of one window does not fit")


def _fits(config: TrainConfig, device: str, precision: str) -> bool:
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
