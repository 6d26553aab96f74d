"""The ranks of a run: which one this process is, and what they agree on outside of training.

torchrun, srun or :mod:`src.runs.launch` starts one process per rank. Before training, and whenever a rank fails, they
communicate through PyTorch's key-value store.
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

RUN, SWEEP = "src.train", "src.train in a sweep"  # ROLE_NAME of the processes that src.runs.launch starts
CONNECT_TIMEOUT = timedelta(minutes=10)

_calls = itertools.count()


class FailedElsewhere(Exception):
    """Another rank has failed and reports the reason."""

    told = True


def _under_srun() -> bool:
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ and not interactive


def rank() -> int:
    """The rank of this process. Only rank 0 logs and writes files."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if _under_srun() else 0


def world_size() -> int:
    """The number of ranks of the run; 1 before they are started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if _under_srun() else 1


def job_id() -> str | None:
    """What all starts of this run's ranks by SLURM or torchelastic have in common."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return None if job == "none" else job  # torchrun's default


@functools.cache
def restarted() -> bool:
    """Whether torchelastic has started the ranks again because one of them had ended. Every rank calls it: the agent of
    a machine counts only the ends of its own."""
    restarts, most = (int(os.environ.get(f"TORCHELASTIC_{key}", "0")) for key in ("RESTART_COUNT", "MAX_RESTARTS"))
    if world_size() == 1 or not most:
        return restarts > 0
    _store().add("restarts", restarts)
    _store().add("counted", 1)
    _wait_until(lambda: _store().add("counted", 0) >= world_size())
    return _store().add("restarts", 0) > 0


def started_here() -> bool:
    """Whether :mod:`src.runs.launch` started this process."""
    return os.environ.get("ROLE_NAME") in (RUN, SWEEP)


@functools.cache
def _store() -> Any:
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    url = "env://"
    if _under_srun() and "TORCHELASTIC_RUN_ID" not in os.environ:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment()
        url = f"tcp://{slurm.main_address}:{slurm.main_port}?rank={rank()}&world_size={world_size()}"
    try:
        return next(rendezvous(url, timeout=CONNECT_TIMEOUT))[0]
    except DistError as error:
        raise ValueError(f"not all of the {world_size()} ranks connected within {CONNECT_TIMEOUT}: {error}") from error


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """The result of ``make`` on rank 0, which JSON can hold, on every rank. The other ranks do not call ``make``.

    Raises:
        FailedElsewhere: another rank has failed.
    """
    if world_size() == 1:
        return make()
    store, key = _store(), f"from_rank_zero/{next(_calls)}"
    if rank() > 0:
        _wait_until(lambda: store.check([key]))
        return json.loads(store.get(key))
    try:
        value = make()
    except BaseException:
        first_to_fail()
        raise
    store.set(key, json.dumps(value))
    return value


def wait_for_all() -> None:
    """Wait until every rank has called this; raises as :func:`from_rank_zero`."""
    if world_size() > 1:
        _store().add("arrived", 1)
        _wait_until(lambda: _store().add("arrived", 0) >= world_size())


def _wait_until(ready: Callable[[], bool]) -> None:
    # Polling, because a blocking wait of the store handles neither signals nor the failure of another rank.
    try:
        while not ready():
            if _store().add("failed", 0):
                raise FailedElsewhere("another rank has failed")
            time.sleep(0.05)
    except RuntimeError as error:
        raise FailedElsewhere(f"the store's process has ended: {error}") from None


@functools.cache
def first_to_fail() -> bool:
    """Tell the other ranks that this one fails. True for the first to do so, which reports the reason."""
    try:
        return world_size() == 1 or _store().add("failed", 1) == 1
    except RuntimeError:  # the store's process has ended
        return False


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` is what a rank meets when another one has died."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    signs += ("remote process exited",)  # NCCL; its other errors are this rank's own
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    lost |= isinstance(error, FailedElsewhere) or type(error).__name__ in ("DistNetworkError", "DistStoreError")
    return lost and world_size() > 1


def reported_elsewhere(error: BaseException) -> bool:
    """Tell the other ranks that this one fails with ``error``. True if another rank or the launcher reports why."""
    first = first_to_fail()
    return not first or (started_here() and lost_peer(error.__cause__ or error))
