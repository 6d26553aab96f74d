"""The command line of a run with several ranks: rank 0 reads it, the others receive it, and all use one folder."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.checkpoint.interruption import SIGNALS, Interrupted
from src.cli import app
from src.cli.overrides import compose
from src.cli.quoting import key_of, quoted, resume_override, split_overrides
from src.cli.sweep import KEY, write_sweep
from src.files import read_json, remove_folder, write_json
from src.runs import launch, processes
from src.runs.record import read_record


def sweeping() -> bool:
    """Whether this is a job of a sweep, whose table reports each of its folders."""
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return multirun or os.environ.get("ROLE_NAME") == processes.SWEEP


def job(run: Callable[[DictConfig, Path], float | None]) -> Callable[[DictConfig], float | None]:
    """A Hydra job that calls ``run`` with its config and run folder, in as many processes as the config asks for, and
    returns the objective; the folder of a job that left no ``run.json`` is removed. Each job of a sweep has processes
    of its own, and those that are completed are not repeated in a sweep that is continued."""

    def hydra_job(cfg: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        starts = sweeping() and not processes.started_here() and processes.world_size() == 1
        try:
            if starts and cfg.sweep.resume and read_record(folder).get("status") == "completed":
                print(f"{folder} is completed")
                return read_record(folder).get("val_loss")
            count = 0 if processes.world_size() > 1 else launch.devices_here(OmegaConf.to_container(cfg.trainer))
            if starts or count > 1 or (count and cfg.max_restarts and not processes.started_here()):
                start_ranks(count, folder, cfg.max_restarts)
                return read_record(folder).get("val_loss")
            if processes.rank():
                _be_quiet()
            return run(cfg, folder)
        except BaseException as error:
            told = processes.reported_elsewhere(error) or getattr(error, "told", False)
            error.told = told  # pyright: ignore[reportAttributeAccessIssue]  # any exception, for src.cli.app
            basic = HydraConfig.get().runtime.choices.get("hydra/sweeper") == "basic"
            if starts and basic and isinstance(error, Interrupted):
                again = resume_override(Path(HydraConfig.get().sweep.dir), KEY)
                print(f"to continue the sweep: python -m src.train -m {again}", file=sys.stderr)
            raise
        finally:
            _ignore_signals()
            if starts:
                with suppress(OSError):
                    write_sweep(Path(HydraConfig.get().sweep.dir))
            if processes.rank() == 0 and not (sweeping() or (folder / "run.json").exists()):
                app.close_log_files(folder)
                remove_folder(folder, ".hydra", f"{HydraConfig.get().job.name}.log")

    return hydra_job


def start_ranks(count: int, folder: Path, max_restarts: int) -> None:
    """Run the current Hydra job with ``count`` ranks in ``folder``; raises as :func:`src.runs.launch.start`, which
    describes ``max_restarts``."""
    task, subfolder = list(HydraConfig.get().overrides.task), "null"
    overrides = [override for override in task if key_of(override) != KEY]
    if overrides != task:  # a sweep is continued, and Hydra has written nothing yet
        begun = (folder / "run.json").exists()
        attempts = len(read_record(folder).get("resumed_at", [])) + 1
        subfolder = f".hydra/resumed_{attempts}" if begun else ".hydra"
        overrides += [f"resume={quoted(folder)}"] * begun
    overrides += [f"hydra.run.dir={quoted(folder)}", f"hydra.output_subdir={subfolder}"]
    role = processes.SWEEP if sweeping() else processes.RUN
    try:
        launch.start(["-m", "src.train", *overrides], count, role, resume_override(folder), max_restarts)
    except processes.FailedElsewhere as error:
        record = read_json(folder / "run.json")
        if record.get("status") in ("running", "interrupted"):  # rank 0 was killed, or torchelastic stopped it
            write_json(folder / "run.json", {**record, "status": "failed", "error": str(error)})
        raise


def agree_on_arguments(make: Callable[[], list[str]]) -> list[str]:
    """The arguments of all ranks. Where torchrun or srun started them, rank 0 makes them and chooses the run folder."""
    if processes.started_here():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise stack traces for each lost connection
        if processes.world_size() > 1:  # else as many as PyTorch or the launcher of a sweep chooses
            os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes.world_size(), 1)))
        threading.Thread(target=launch.stop_with_launcher, daemon=True).start()
        if not processes.restarted():
            return sys.argv[1:]
        arguments = processes.from_rank_zero(_started_again)
        if not isinstance(arguments, list):
            sys.exit(arguments)
        return [*arguments, "hydra.output_subdir=null"] if processes.rank() else arguments
    shared, most = (os.environ.get(f"TORCHELASTIC_{key}", "0") for key in ("USE_AGENT_STORE", "MAX_RESTARTS"))
    if shared == "True" and most != "0":  # restarted ranks would find what those before them have left there
        problem = "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; export it first"
        app.fail([] if processes.rank() else [problem])
    processes.restarted()  # by all ranks
    arguments = processes.from_rank_zero(make if processes.world_size() == 1 else lambda: _with_folder(make))
    if processes.rank() == 0:
        return arguments
    if _flags(arguments):
        sys.exit(0)  # rank 0 answers --help
    return [*arguments, "hydra.output_subdir=null"]


def _started_again() -> list[str] | int:
    """The arguments of ranks that are started again: those of a run that is resumed, if it had begun; or the exit
    status of a run that is completed, or whose loss would be non-finite again."""
    folder = Path(split_overrides(sys.argv[1:], "hydra.run.dir")[2][-1])
    record, resumed = read_record(folder), any(key_of(argument) == "resume" for argument in sys.argv[1:])
    if record.get("status") == "completed" and not resumed:
        return 0
    if str(record.get("error")).startswith("NonFiniteError"):
        return 1
    print("a rank has ended, starting all again", file=sys.stderr)
    begun = bool(record) and not resumed
    own = [] if (folder / ".hydra").exists() else ["hydra.output_subdir=.hydra"]
    return [*sys.argv[1:], *[f"resume={quoted(folder)}"] * begun, *own]


def _with_folder(make: Callable[[], list[str]]) -> list[str]:
    if {"-m", "--multirun"} & set(sys.argv):
        app.fail(["-m runs one job after another and starts the ranks of each itself; use it without torchrun or srun"])
    arguments = make()
    if _flags(arguments) or any(argument.startswith("hydra.run.dir=") for argument in arguments):
        return arguments
    folder = compose("train", arguments, return_hydra_config=True).hydra.run.dir
    return [*arguments, f"hydra.run.dir={quoted(folder)}"]


def _flags(arguments: list[str]) -> bool:
    return any(argument.startswith("-") for argument in arguments)


def _be_quiet() -> None:
    """Let a rank other than 0 print errors only."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _ignore_signals() -> None:
    """At the end of a rank: a launcher signals the remaining ranks as soon as the first one has ended."""
    if processes.world_size() > 1 and threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
