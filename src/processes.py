"""The processes of a run, one per device: started here, by torchrun or by srun, and what they tell each other."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src import cli
from src.resume import quoted
from src.training.interruption import SIGNALS, Interrupted

STRATEGIES = ("auto", "ddp", "fsdp")
STARTED_HERE = "GPT2_LIGHTNING_PROCESS"  # in the environment of a process that start() made
ARRIVAL = timedelta(minutes=10)  # that processes wait for each other before training
PATIENCE = 30  # seconds that the others have to end by themselves once one has failed


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


def problems_of_devices(trainer: dict[str, Any]) -> list[str]:
    """What is impossible about devices, machines and strategy wherever the run starts, a line each."""
    devices, nodes, accelerator = trainer["devices"], trainer["num_nodes"], trainer["accelerator"]
    found, count = [], _count(devices)
    if count is None:
        return [f"trainer.devices={devices} is neither a number of devices, nor auto, nor a list: trainer.devices=1"]
    if trainer["strategy"] not in STRATEGIES:
        found.append(f"trainer.strategy={trainer['strategy']} is none of {', '.join(STRATEGIES)}: trainer.strategy=ddp")
    if trainer["strategy"] == "fsdp" and str(trainer["precision"]) in ("16-mixed", "16", "64-true", "64"):
        found.append(f"trainer.precision={trainer['precision']} is nothing for fsdp: trainer.precision=bf16-mixed")
    if accelerator == "cpu" and ((count < 0 and devices != "auto") or isinstance(devices, list)):
        found.append(f"trainer.devices={devices} does not say how many processes share the CPU: trainer.devices=2")
    if accelerator in ("mps", "tpu") and count > 1:
        found.append(f"trainer.devices={devices}: one device with trainer.accelerator={accelerator}: trainer.devices=1")
    started = world_size()
    if nodes > 1 and started == 1:
        found.append(
            f"trainer.num_nodes={nodes}: the processes on each machine are started by srun or torchrun: srun python -m "
            f"src.train ..., or trainer.num_nodes=1"
        )
    elif started > 1 and count > 0 and count * nodes != started:
        cure = f"trainer.devices={started // nodes}" if started % nodes == 0 else f"trainer.num_nodes={started}"
        found.append(f"trainer.devices={devices} on {nodes} machines, but {started} processes were started: {cure}")
    if max(count * nodes, started) > 1 or count < 0:
        if trainer["use_distributed_sampler"]:
            found.append(
                "trainer.use_distributed_sampler=true would change the order of the data: "
                "trainer.use_distributed_sampler=false"
            )
        if trainer["overfit_batches"] and devices != "auto":
            found.append(
                f"trainer.overfit_batches={trainer['overfit_batches']} is a check for one device: trainer.devices=1"
            )
    return found


def _count(devices: Any) -> int | None:
    """How many devices ``trainer.devices`` asks for; -1: all there are, None: nonsense."""
    if isinstance(devices, str) and devices.lstrip("-").isdecimal():
        devices = int(devices)
    if devices in ("auto", -1):
        return -1
    if isinstance(devices, list) and devices and all(type(one) is int and one >= 0 for one in devices):
        return len(set(devices))
    return devices if type(devices) is int and devices > 0 else None


def planned_count(trainer: dict[str, Any]) -> int:
    """How many processes the run is to have, as far as its config says."""
    return max(world_size(), (_count(trainer["devices"]) or 1) * trainer["num_nodes"])


def devices_here(cfg: DictConfig) -> int:
    """Processes that this machine is to run.

    Raises:
        ValueError: more devices than the machine has.
    """
    devices = OmegaConf.to_container(cfg.trainer)["devices"]
    count, accelerator = _count(devices), cfg.trainer.accelerator
    if count == 1 or accelerator == "cpu":
        return max(count, 1)
    import torch

    from src.training.device import pick_accelerator

    picked = pick_accelerator(accelerator)
    if picked == "cuda":
        present = torch.cuda.device_count()
        if count > present or (isinstance(devices, list) and max(devices) >= present):
            raise ValueError(f"trainer.devices={devices}, but this machine has {present}: trainer.devices={present}")
        return present if count < 0 else count
    if count > 1:
        cure = f"trainer.accelerator=cpu for {count} processes on its CPU" if picked == "cpu" else "trainer.devices=1"
        raise ValueError(f"trainer.devices={devices}, but this machine has no GPU to share out: {cure}")
    return 1


def start(overrides: list[str], count: int, folder: Path) -> None:
    """Run ``python -m src.train`` with ``overrides`` in ``count`` processes and wait for them; signals are passed on.

    Once one has failed, the others have :data:`PATIENCE` to end. Should this process be killed, they stop as after
    SIGTERM.

    Raises:
        FailedElsewhere: one of them failed.
        Interrupted: they were asked to stop.
    """
    arguments = [*overrides, f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {  # as torchrun sets them
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": str(port)},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", STARTED_HERE: "1"},
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # else stack traces at each lost process
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1))),
    }
    children: list[subprocess.Popen] = []

    def pass_on(signum: int, _: Any) -> None:
        for child in children:
            child.send_signal(signum)

    listening = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, pass_on) for signum in SIGNALS} if listening else {}
    try:
        for number in range(count):
            place = {"RANK": str(number), "LOCAL_RANK": str(number)}
            command = [sys.executable, "-m", "src.train", *arguments]
            children.append(subprocess.Popen(command, env={**os.environ, **common, **place}, stdin=subprocess.PIPE))
        first = _wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdin.close()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if first is None:
        return
    status = first.returncode
    if status - 128 in SIGNALS:
        interrupted = Interrupted(status - 128)
        interrupted.told = True
        raise interrupted
    if status < 0:
        name = signal.Signals(-status).name
        why = ", often for want of memory" if name == "SIGKILL" else ""
        number = children.index(first)
        print(f"error: process {number} of {count} was killed by {name}{why}: resume={folder}", file=sys.stderr)
    raise FailedElsewhere(f"a process ended with status {status}")


def _wait(children: list[subprocess.Popen]) -> subprocess.Popen | None:
    """Until all have ended; the first to fail, if any."""
    first, deadline = None, float("inf")
    while any([child.poll() is None for child in children]):
        if first is None and (failed := [child for child in children if child.returncode]):
            first, deadline = failed[0], time.monotonic() + PATIENCE
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return first or next((child for child in children if child.returncode), None)


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
            cli.fail(["-m makes one run after another and starts the processes of each: leave torchrun or srun away"])
        arguments = make()
        if any(argument.startswith("-") for argument in arguments):
            return arguments
        given = [argument for argument in arguments if argument.startswith("hydra.run.dir=")]
        folder = cli.compose("train", arguments, return_hydra_config=True).hydra.run.dir
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
    """Tell the other processes that this one fails with ``error``; whether another, or start(), is to tell the user."""
    first = peers().first_to_fail()
    return not first or (STARTED_HERE in os.environ and lost_peer(error.__cause__ or error))
