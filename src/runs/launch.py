"""The number of ranks a run needs on this machine, and starting them where neither srun nor torchrun does."""

import logging
import os
import signal
import sys
import time
from typing import Any

from src.checkpoint.interruption import SIGNALS, Interrupted, Interruption, heeded_signals
from src.runs.processes import FailedElsewhere, world_size

SAVE_TIMEOUT = 1800  # seconds to save a checkpoint after a signal; torch before 2.13 allows 30


def problems_of_devices(trainer: dict[str, Any]) -> list[str]:
    """What is wrong with the devices, nodes and strategy of the ``trainer`` section on any machine, a line each."""
    devices, nodes, accelerator = trainer["devices"], trainer["num_nodes"], trainer["accelerator"]
    strategy, precision = trainer["strategy"], str(trainer["precision"])
    found, count, started = [], _count(devices), world_size()
    if count is None:
        return [
            f"trainer.devices={devices} is not a number of devices, a list of devices or auto; use trainer.devices=1"
        ]
    if strategy == "fsdp" and precision in ("16-mixed", "16", "64-true", "64"):
        found.append(f"trainer.precision={precision} is not supported with fsdp; use trainer.precision=bf16-mixed")
    if accelerator == "cpu" and ((count < 0 and devices != "auto") or isinstance(devices, list)):
        found.append(f"trainer.devices={devices} is not a number of processes for the CPU; use trainer.devices=2")
    if nodes > 1 and started == 1:
        found.append(
            f"trainer.num_nodes={nodes} needs a launcher on each node; use srun python -m src.train ..., torchrun, or "
            f"trainer.num_nodes=1"
        )
    elif started > 1 and count > 0 and count * nodes != started:
        fix = f"trainer.devices={started // nodes}" if started % nodes == 0 else f"trainer.num_nodes={started}"
        found.append(f"trainer.devices={devices} on {nodes} nodes, but {started} processes were started; use {fix}")
    if may_be_several(trainer):
        if trainer["use_distributed_sampler"]:
            found.append(
                "trainer.use_distributed_sampler=true changes the order of the data; use "
                "trainer.use_distributed_sampler=false"
            )
        if trainer["overfit_batches"] and devices != "auto":
            batches = trainer["overfit_batches"]
            found.append(f"trainer.overfit_batches={batches} is a check for one device; use trainer.devices=1")
    return found


def _count(devices: Any) -> int | None:
    """The number of devices that ``trainer.devices`` asks for; -1 for all of them, None for an invalid value."""
    if isinstance(devices, str) and devices.lstrip("-").isdecimal():
        devices = int(devices)
    if devices in ("auto", -1):
        return -1
    if isinstance(devices, list) and devices and all(type(one) is int and one >= 0 for one in devices):
        return len(set(devices))
    return devices if type(devices) is int and devices > 0 else None


def planned_count(trainer: dict[str, Any]) -> int:
    """The world size that the ``trainer`` section asks for, or that of the ranks that were started."""
    return max(world_size(), (_count(trainer["devices"]) or 1) * trainer["num_nodes"])


def may_be_several(trainer: dict[str, Any]) -> bool:
    """Whether the ``trainer`` section asks for more than one process, or for all devices, or several were started."""
    return planned_count(trainer) > 1 or _count(trainer["devices"]) == -1


def devices_here(trainer: Any) -> int:
    """The number of ranks that the ``trainer`` section, a dictionary, starts on this machine.

    Raises:
        ValueError: the machine has fewer devices.
    """
    devices, accelerator = trainer["devices"], trainer["accelerator"]
    count = _count(devices) or 1
    if count == 1 or accelerator == "cpu":
        return max(count, 1)
    import torch

    from src.device import pick_accelerator

    picked = pick_accelerator(accelerator)
    present = {"cuda": torch.cuda.device_count(), "cpu": 0}.get(picked, 1)
    if count > present or (isinstance(devices, list) and max(devices) >= present):
        fix = f"trainer.devices={present}" if present else f"trainer.accelerator=cpu for {count} processes on the CPU"
        raise ValueError(f"trainer.devices={devices}, but this machine has {present or 'no'} GPU(s); use {fix}")
    return count if count > 0 else max(present, 1)


def start(arguments: list[str], count: int, role: str, resume: str, max_restarts: int = 0) -> None:
    """Run ``python *arguments`` in ``count`` processes through torchelastic, pass signals on and wait for the end.

    Once one has failed, torchelastic sends the others SIGTERM and, 30 s later, SIGKILL, and up to ``max_restarts``
    times starts all of them again. ``role`` is their ``ROLE_NAME``, ``resume`` the override that continues the run.

    Raises:
        FailedElsewhere: one of them failed, and the reason is printed.
        Interrupted: they were asked to stop.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_TIMEOUT))
    node: dict[str, Any] = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": count, "local_addr": "localhost"}
    rendezvous: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    signals = ",".join(signum.name for signum in heeded_signals())
    logs = DefaultLogsSpecs(os.devnull)
    config = LaunchConfig(
        **node, **rendezvous, role=role, max_restarts=max_restarts, signals_to_handle=signals, logs_specs=logs
    )
    if max_restarts:  # or restarted ranks would find the addresses of those before them (pytorch/pytorch#135712)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    escaped = [argument.replace("$", "$$") for argument in arguments]  # torchelastic takes them as string.Template
    logging.disable()  # torchelastic logs each process
    try:
        with Interruption():  # restores the handlers that torchelastic replaces
            elastic_launch(config, sys.executable)(*escaped)
        return
    except SignalException as error:
        code, rank = 128 + error.sigval, None
    except ChildFailedError as error:
        # Timestamps are whole seconds. Within one, a killed rank is the reason why the others exit, and SIGTERM is what
        # torchelastic sent them.
        failures = [
            (one.timestamp, one.exitcode == -signal.SIGTERM, one.exitcode, rank) for rank, one in error.failures.items()
        ]
        _, _, code, rank = min(failures)
    finally:
        logging.disable(logging.NOTSET)
    signum = code - 128 if code > 0 else -code
    if signum in SIGNALS:
        interrupted = Interrupted(signum)
        interrupted.told = True
        raise interrupted
    if code < 0:
        name = signal.Signals(signum).name
        why = ", often because memory ran out" if name == "SIGKILL" else ""
        who = f"rank {rank} of {count}" if count > 1 else "the process"
        print(f"error: {who} was killed by {name}{why}; use {resume}", file=sys.stderr)
    raise FailedElsewhere(f"rank {rank} " + (f"was killed by {name}" if code < 0 else f"ended with exit code {code}"))


def stop_with_launcher() -> None:
    """Watch the process that started this one, and send SIGTERM to this one when it has been killed."""
    launcher = int(os.environ["TORCHELASTIC_RUN_ID"])
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
