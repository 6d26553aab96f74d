"""The processes of a run, one per device, and what they tell each other outside of training."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from src.cli import app
from src.cli.quoting import quoted

STARTED_HERE = "GPT2_LIGHTNING_PROCESS"  # "run" or "sweep" in the environment of a process that src.runs.launch made
ARRIVAL = timedelta(minutes=10)  # that processes wait for each other before training


class FailedElsewhere(Exception):
    """Another process of this run has failed, and says why."""

    told = True


def _under_srun() -> bool:
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ and not interactive


def rank() -> int:
    """Which of the run's processes this is; 0 speaks and writes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if _under_srun() else 0


def world_size() -> int:
    """How many processes the run has; 1 before they are started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if _under_srun() else 1


def sweeping() -> bool:
    """Whether this is a job of a sweep, whose table tells of each of its folders."""
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return multirun or os.environ.get(STARTED_HERE) == "sweep"


def agree_on_arguments(make: Callable[[], list[str]]) -> list[str]:
    """The arguments that ``make`` finds, for all processes of a run that torchrun or srun has started: rank 0 makes
    them, with the run folder among them, and the others take them over."""
    if STARTED_HERE in os.environ:
        threading.Thread(target=_stop_with_the_parent, daemon=True).start()
        return sys.argv[1:]
    if world_size() == 1:
        return make()

    def with_folder() -> list[str]:
        if {"-m", "--multirun"} & set(sys.argv):
            app.fail(["-m makes one run after another and starts the processes of each: leave torchrun or srun away"])
        arguments = make()
        if any(argument.startswith("-") for argument in arguments):
            return arguments
        given = [argument for argument in arguments if argument.startswith("hydra.run.dir=")]
        folder = app.compose("train", arguments, return_hydra_config=True).hydra.run.dir
        return arguments if given else [*arguments, f"hydra.run.dir={quoted(folder)}"]

    arguments = peers().said_by_rank_zero(with_folder)
    if rank() and any(argument.startswith("-") for argument in arguments):
        sys.exit(0)  # --help and its like are answered once
    return [*arguments, "hydra.output_subdir=null"] if rank() else arguments


def _stop_with_the_parent() -> None:
    os.read(0, 1)  # nothing is ever written: it ends when the parent does
    os.kill(os.getpid(), signal.SIGTERM)


@functools.cache
def peers() -> Peers:
    return Peers()


class Peers:
    """What the processes of a run tell each other outside of training, through PyTorch's key-value store.

    None of it waits for a process that has failed: then it raises :class:`FailedElsewhere`.
    """

    def __init__(self) -> None:
        self.rank, self.count = rank(), world_size()
        self._said = 0
        self._first: bool | None = None  # to fail
        if self.count == 1:
            return
        from torch.distributed import DistError, PrefixStore, rendezvous

        if _under_srun() and "TORCHELASTIC_RUN_ID" not in os.environ:
            from lightning.pytorch.plugins.environments import SLURMEnvironment

            slurm = SLURMEnvironment()
            os.environ |= {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
            os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.count)}
        try:
            store, _, _ = next(rendezvous("env://", timeout=ARRIVAL))
        except DistError as error:
            raise FailedElsewhere(f"rank 0 does not answer: {error}") from None
        # torchrun starts processes that have failed again, up to --max-restarts, with the same store
        self._store = PrefixStore(f"run{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def said_by_rank_zero(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, anything that JSON can hold; the others do not call it."""
        if self.count == 1:
            return make()
        self._said += 1
        key = f"said{self._said}"
        if self.rank == 0:
            try:
                value = make()
            except BaseException:
                self.first_to_fail()
                raise
            self._store.set(key, json.dumps(value))
            return value
        self._until(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def wait_for_all(self) -> None:
        """Until every process has come here.

        Raises:
            ValueError: some did not come in time.
        """
        if self.count > 1:
            self._store.add("here", 1)
            self._until(lambda: self._store.add("here", 0) >= self.count)

    def first_to_fail(self) -> bool:
        """Whether this process, which is failing, is the first one to, and should say why."""
        if self._first is None:
            try:
                self._first = self.count == 1 or self._store.add("failed", 1) == 1
            except RuntimeError:  # rank 0, which keeps the store, has gone
                self._first = False
        return self._first

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ARRIVAL.total_seconds()
        try:
            while not true():
                if self._store.add("failed", 0):
                    raise FailedElsewhere("another process has failed")
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"not all of {self.count} processes came within {ARRIVAL}: start them all with srun or torchrun"
                    )
                time.sleep(0.05)
        except RuntimeError as error:
            raise FailedElsewhere(f"rank 0 has gone: {error}") from None


def be_quiet() -> None:
    """All but rank 0 say nothing but why they fail."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` is what a process meets when another one of its run has died."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
    known = type(error) is RuntimeError and any(sign in str(error) for sign in signs)
    known = known or type(error).__name__.startswith("Dist") or isinstance(error, FailedElsewhere)
    return known and world_size() > 1


def told_elsewhere(error: BaseException) -> bool:
    """Tell the other processes that this one fails; whether another one, or src.runs.launch, is to tell the user why."""
    first = peers().first_to_fail()
    return not first or (STARTED_HERE in os.environ and lost_peer(error.__cause__ or error))
