"""Pre-train a model: ``python -m src.train [overrides]``. See ``conf/train.yaml``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.checkpoint.pickles import is_checkpoint
from src.cli import app, ranks
from src.cli.overrides import unknown_trainer_arguments
from src.cli.quoting import command_line, resume_override
from src.cli.resume import COMMAND
from src.cli.sweep import resumed_sweep
from src.cli.typed import built, typed
from src.config import problems_of, refuse
from src.interop.locate import locate
from src.runs import launch, processes
from src.runs.record import RunRecord, read_record
from src.training.config import TrainConfig

if TYPE_CHECKING:  # a wrong command line is answered without the seconds that these imports take
    from lightning.pytorch import Trainer

    from src.data.datamodule import TextDataModule
    from src.training.module import PretrainingModule


@dataclass
class Run:
    """What a run built and where it is kept; ``record`` is what its ``run.json`` holds. A dry run builds no module."""

    folder: Path
    trainer: Trainer
    module: PretrainingModule | None
    datamodule: TextDataModule
    record: dict[str, Any]


def check(cfg: DictConfig) -> TrainConfig:
    """``cfg`` as a frozen config.

    Raises:
        ValueError: every problem that can be found without reading the text or building the model, one per line.
    """
    config = typed(cfg, TrainConfig)
    trainer = config.trainer.model_dump()
    found = [*unknown_trainer_arguments(trainer), *launch.problems_of_devices(trainer)]
    if not (config.weights or config.ckpt_path):
        found += problems_of(config.accumulated, launch.planned_count(trainer))
    if config.weights and not config.resume:
        found += problems_of(locate, config.weights)
    if config.max_restarts and processes.world_size() > 1 and not processes.started_here():
        found.append(
            f"max_restarts={config.max_restarts} is not for ranks that another program starts; use max_restarts=0, and "
            f"torchrun --max-restarts={config.max_restarts}"
        )
    if config.ckpt_path and not config.resume and not is_checkpoint(Path(config.ckpt_path)):
        found.append(
            f"ckpt_path={config.ckpt_path} is not a file (seen from {Path.cwd()}); "
            f"use ckpt_path=<run folder>/checkpoints/last.ckpt"
        )
    refuse(found)
    return config


def train(cfg: DictConfig, folder: Path) -> Run:
    """Train as ``cfg`` says and leave everything in ``folder``; with ``cfg.resume``, continue the run in it.

    Raises:
        ValueError: the problems of the config, all at once; a text that is missing, unreadable or too short; a folder
            that already holds a run; a checkpoint of another model, text or batch; a run that made no optimizer step;
            memory that ran out; a data worker that died.
        OSError: a disk that is full or cannot be written to.
        Interrupted: SIGTERM, SIGINT, SIGUSR1 or SIGHUP, once the current step is finished and saved.
    """
    config = check(cfg)
    if config.resume and Path(config.resume).resolve() != folder.resolve():
        raise ValueError(f"resume={config.resume} is not the run folder {folder}; use resume={folder}")
    from lightning.pytorch import seed_everything

    from src.checkpoint.interruption import Interruption
    from src.model.architectures import count_parameters
    from src.runs import report, reproduce
    from src.runs.fit import build_data, fit
    from src.runs.plan import make_plan
    from src.runs.start import find_start
    from src.training.trainer import build_module, build_trainer, continue_logs

    first = processes.rank() == 0
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    command = os.environ.get(COMMAND) or command_line(overrides)
    with (
        report.explained(config, folder, resume_override(folder)),
        Interruption(first) as interruption,
        RunRecord(folder, config, command, overrides, writes=first, in_sweep=ranks.sweeping()) as record,
    ):
        start = find_start(config, folder)
        watching = built(config.callbacks)
        record.loggers = built(config.logger, save_dir=str(folder)) if first and not config.dry_run else []
        trainer = build_trainer(start.config, folder, interruption, watching, record.loggers, processes.world_size())
        seed_everything(config.seed, verbose=False)
        data, batches, steps = build_data(start, trainer)
        start.check(data, batches, steps, finished=record.completed_before or not config.resume)
        device = trainer.strategy.root_device.type
        start = start.with_vocabulary(data, device)
        config, schedule_steps = start.config, start.schedule_steps(steps)
        parameters = count_parameters(config.model)
        plan = make_plan(config, trainer, data, steps, start.step, parameters)
        if config.resume and not config.dry_run:
            report.print_changes(read_record(folder), config.model_dump(mode="json"))
            start.take_over(folder)
            continue_logs(trainer, start.step if start.path else -1)
            record.start(start.step)
        record.describe(config, trainer, data, parameters)
        report.print_start_card(config, record.values, trainer, data, steps, plan)
        reproduce.print_differences(config, record)
        processes.wait_for_all()
        module = None
        if not config.dry_run:
            skip_batches = start.skip_batches(data.windows_per_batch)
            module = build_module(config, device, schedule_steps, skip_batches, config.trainer.strategy == "fsdp")
            start.load_weights(module)
            fit(start, trainer, module, data, record)
            reproduce.print_outcome(config, record)
        record.update(status="checked" if config.dry_run else "completed")
    report.print_summary(record.values, folder)
    return Run(folder, trainer, module, data, record.values)


if __name__ == "__main__":
    job = ranks.job(lambda cfg, folder: train(cfg, folder).record.get("val_loss"))  # the objective of a sweep
    app.launch("train", job, check, resumed_sweep, ranks.agree_on_arguments)
