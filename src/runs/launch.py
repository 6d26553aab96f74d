"""How many processes a run needs on this machine, and starting them; srun and torchrun do so by themselves."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.checkpoint.interruption import SIGNALS, Interrupted, heeded_signals
from src.cli.quoting import as_typed, quoted
from src.runs.processes import STARTED_HERE, FailedElsewhere, sweeping, world_size

STRATEGIES = ("auto", "ddp", "fsdp")
PATIENCE = 30  # seconds that the others have to end by themselves once one has failed


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

    from src.device import pick_accelerator

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
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"},
        STARTED_HERE: "sweep" if sweeping() else "run",
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # else stack traces at each lost process
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1))),
    }
    children: list[subprocess.Popen] = []

    def pass_on(signum: int, _: Any) -> None:
        for child in children:
            child.send_signal(signum)

    listening = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, pass_on) for signum in heeded_signals()} if listening else {}
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
    status = first.returncode if first else 0
    if not status:
        return
    if status - 128 in SIGNALS:
        interrupted = Interrupted(status - 128)
        interrupted.told = True
        raise interrupted
    if status < 0:
        name = signal.Signals(-status).name
        why = ", often for want of memory" if name == "SIGKILL" else ""
        number = children.index(first)
        resume = shlex.quote(f"resume={as_typed(folder)}")
        print(f"error: process {number} of {count} was killed by {name}{why}: {resume}", file=sys.stderr)
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
