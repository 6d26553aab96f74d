"""Pre-train a model: ``python -m src.train [overrides]``. See ``conf/train.yaml``."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import cli, report
from src.data.config import DataConfig
from src.model.config import GPTConfig
from src.record import RunRecord
from src.training.config import CheckpointConfig, EvalConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainerLimits

if TYPE_CHECKING:  # a wrong command line is answered without the seconds that these imports take
    from lightning.pytorch import Trainer

    from src.data.datamodule import TextDataModule
    from src.training.module import PretrainingModule

SECTIONS = {
    "": RunConfig,
    "model": GPTConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "eval": EvalConfig,
    "checkpoint": CheckpointConfig,
    "trainer": TrainerLimits,
}
DEFAULT_EPOCHS = 10


@dataclass
class Run:
    """What a run built and where it is kept; ``record`` is what its ``run.json`` holds."""

    folder: Path
    trainer: Trainer
    module: PretrainingModule
    datamodule: TextDataModule
    record: dict[str, Any]


def find_problems(cfg: DictConfig) -> list[str]:
    """Everything wrong with ``cfg`` that can be known without reading the text or building the model, a line each."""
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        return [str(error).splitlines()[0]]
    checked, found = cli.check_sections(cfg, SECTIONS)
    if found:  # the rest relies on each number being sound by itself
        return found
    top, model, data, trainer, schedule, optimizer = (
        checked[key] for key in ("", "model", "data", "trainer", "schedule", "optimizer")
    )
    if model.vocab_size < 50257:
        found.append(f"model.vocab_size={model.vocab_size} is less than the tokenizer's 50257: model.vocab_size=50257")
    if data.context_length != model.context_length:
        found.append(
            f"data.context_length={data.context_length} is not the model's: model.context_length={data.context_length}"
        )
    if config["trainer"]["devices"] not in (1, "1", "auto") or trainer.num_nodes != 1:
        found.append(f"trainer.devices={config['trainer']['devices']}: one device for now: trainer.devices=1")
    if schedule.name == "warmup_cosine":
        steps = trainer.max_steps
        if 0 < steps < schedule.warmup_steps:
            found.append(
                f"schedule.warmup_steps={schedule.warmup_steps:g} is longer than trainer.max_steps={steps}: "
                f"schedule.warmup_steps=0.2"
            )
        if steps == trainer.max_epochs == -1:
            found.append(
                "trainer.max_epochs=-1 leaves schedule=warmup_cosine without an end: "
                "trainer.max_steps=<n> or schedule=constant"
            )
        for key in ("initial_lr", "min_lr"):
            if (getattr(schedule, key) or 0) > optimizer.learning_rate:
                found.append(
                    f"schedule.{key}={getattr(schedule, key)} is above "
                    f"optimizer.learning_rate={optimizer.learning_rate}: schedule.{key}=0"
                )
    for key in ("ckpt_path", "weights"):
        if (path := getattr(top, key)) is not None and not Path(path).is_file():
            found.append(f"{key}={path} is no file (seen from {Path.cwd()}): {key}=<run folder>/checkpoints/last.ckpt")
    if top.ckpt_path and top.weights:
        found.append(
            "ckpt_path and weights exclude each other: weights=null to continue a run, ckpt_path=null to start one"
        )
    return found


def train(cfg: DictConfig, folder: Path) -> Run:
    """Train as ``cfg`` says and leave everything in ``folder``.

    Raises:
        ValueError: the problems of the config, all at once; a text that is missing, unreadable or too short; a folder
            that already holds a run; a run that made no optimizer step.
    """
    if problems := find_problems(cfg):
        raise ValueError("\n".join(problems))
    started = time.perf_counter()
    record = RunRecord(folder, _command(), OmegaConf.to_container(cfg, resolve=True))
    try:
        run = _train(cfg, folder, record)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        record.update(status=status, error=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - started)
        raise
    record.update(status="checked" if cfg.dry_run else "completed", seconds=time.perf_counter() - started)
    report.print_summary(run)
    return run


def _train(cfg: DictConfig, folder: Path, record: RunRecord) -> Run:
    import torch
    from lightning.pytorch import seed_everything

    from src.callbacks.evaluation import EvaluationSchedule
    from src.callbacks.throughput import Throughput
    from src.training.checkpoint import read_weights
    from src.training.device import device_name, keep_freed_memory
    from src.training.module import PretrainingModule
    from src.training.optim import planned_steps

    weights = None
    for key in ("weights", "ckpt_path"):
        if cfg[key]:
            model, weights = read_weights(cfg[key], key, with_optimizer=key == "ckpt_path")
            _check_same_model(cfg, model, cfg[key])
    config = OmegaConf.to_container(cfg, resolve=True)
    trainer = _build_trainer(cfg, folder)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    seed_everything(cfg.seed, verbose=False)
    datamodule = instantiate(cfg.data, eval_batches=cfg.eval.full_batches)
    datamodule.prepare_data()
    datamodule.setup()
    steps = planned_steps(trainer, len(datamodule.train_dataloader()))
    if not steps:
        raise ValueError(
            f"trainer.limit_train_batches={cfg.trainer.limit_train_batches} and "
            f"trainer.overfit_batches={cfg.trainer.overfit_batches} leave no batch to train on: "
            f"trainer.limit_train_batches=null trainer.overfit_batches=0"
        )
    if config["schedule"]["name"] == "warmup_cosine" and config["schedule"]["warmup_steps"] > steps:
        raise ValueError(
            f"schedule.warmup_steps={cfg.schedule.warmup_steps} is longer than the run's {steps} optimizer steps: "
            f"schedule.warmup_steps=0.2 or a larger trainer.max_epochs"
        )

    torch.manual_seed(cfg.seed)
    module = PretrainingModule(config["model"], config["optimizer"], config["schedule"], cfg.seed)
    if cfg.weights:
        module.net.load_state_dict(weights)
    record.update(
        data_sha256=datamodule.corpus_sha256,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        device=device_name(trainer.strategy.root_device),
        precision=str(trainer.precision),
    )
    run = Run(folder, trainer, module, datamodule, record.values)
    report.print_start_card(run, cfg, steps)
    if cfg.dry_run:
        return run

    report.log_hyperparameters(trainer, config)
    evaluating = trainer.limit_val_batches != 0
    if evaluating and not cfg.ckpt_path:
        trainer.validate(module, datamodule=datamodule, verbose=False)
        if not cfg.weights:
            report.judge_initial_loss(trainer.callback_metrics["val/loss"].item(), module.net.config.vocab_size)
    datamodule.eval_batches = cfg.eval.batches
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    speed = next((callback for callback in trainer.callbacks if isinstance(callback, Throughput)), None)
    record.update(
        optimizer_steps=trainer.global_step,
        tokens_seen=module.tokens_seen,
        tokens_per_second=speed and speed.tokens_per_second,
    )
    if not module.steps_made:
        raise ValueError(
            f"no optimizer step was made, the run is at step {trainer.global_step} of {steps}: "
            f"trainer.max_epochs=<more>, trainer.max_steps=<more> or a longer trainer.max_time"
        )
    by_schedule = any(isinstance(callback, EvaluationSchedule) for callback in trainer.callbacks)
    done, full = (
        [len(loader) for loader in datamodule.eval_dataloaders(batches)]
        for batches in (cfg.eval.batches, cfg.eval.full_batches)
    )
    if evaluating and (not by_schedule or done != full):
        datamodule.eval_batches = cfg.eval.full_batches
        trainer.validate(module, datamodule=datamodule, verbose=False)
    final = {key: value.item() for key, value in trainer.callback_metrics.items()}
    losses = {"train_loss": final.get("train/eval_loss"), "val_loss": final.get("val/loss")}
    for key, loss in losses.items():
        if loss is not None and not math.isfinite(loss):
            raise ValueError(
                f"the run diverged, its {key} is {loss}: "
                f"optimizer.learning_rate=<less than {cfg.optimizer.learning_rate}>"
            )
    val_loss = losses["val_loss"]
    record.update(**losses, val_perplexity=None if val_loss is None else math.exp(min(val_loss, 700)))
    return run


def _build_trainer(cfg: DictConfig, folder: Path) -> Trainer:
    from lightning.pytorch import Trainer

    from src.callbacks.checkpoints import LastCheckpoint, best_checkpoint
    from src.callbacks.evaluation import NEVER, EvaluationSchedule
    from src.training.checkpoint import AtomicCheckpointIO
    from src.training.device import pick_accelerator, pick_precision

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the start card and the summary say it in our words
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*is deprecated.*",
        "The dirpath has changed.*",
        "You're resuming from.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    options = OmegaConf.to_container(cfg.trainer, resolve=True)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    if options["val_check_interval"] is None and options["check_val_every_n_epoch"] is None:
        options["val_check_interval"] = NEVER
        callbacks.insert(0, EvaluationSchedule(cfg.eval.every_steps))
    elif isinstance(options["val_check_interval"], float) and options["check_val_every_n_epoch"] is None:
        options["check_val_every_n_epoch"] = 1  # a share of an epoch, as in Lightning
    if options["enable_checkpointing"]:
        checkpoints = folder / "checkpoints"
        callbacks += [best_checkpoint(checkpoints), LastCheckpoint(checkpoints, **cfg.checkpoint)]
    accelerator = pick_accelerator(options["accelerator"])
    if options["precision"] is None:
        options["precision"] = pick_precision(accelerator)
    if options["max_epochs"] is None and options["max_steps"] == -1:
        options["max_epochs"] = DEFAULT_EPOCHS
    if options["enable_progress_bar"] is None:
        options["enable_progress_bar"] = sys.stdout.isatty()
    options["plugins"] = [AtomicCheckpointIO(), *(options["plugins"] or [])]
    loggers = [instantiate(logger, save_dir=str(folder)) for logger in cfg.logger.values()]
    return Trainer(**options, callbacks=callbacks, logger=loggers or False, default_root_dir=folder)


def _check_same_model(cfg: DictConfig, model: GPTConfig, path: str) -> None:
    """The model of a checkpoint must be the one asked for; dropout and the way to draw weights may change."""
    different = [
        f"model.{key}={cfg.model[key]} differs from {value} in {path}: model.{key}={value}"
        for key, value in vars(model).items()
        if key not in ("drop_rate", "init") and cfg.model[key] != value
    ]
    if different:
        raise ValueError("\n".join(different))


def _command() -> str:
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return shlex.join(["python", "-m", "src.train", *overrides])


def _run(cfg: DictConfig) -> float | None:
    """One Hydra job; its objective is the final validation loss."""
    return train(cfg, Path(HydraConfig.get().runtime.output_dir)).record.get("val_loss")


if __name__ == "__main__":
    cli.launch("train", _run, find_problems)
