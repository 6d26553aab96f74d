"""Pre-train a model: ``python -m src.train [overrides]``. See ``conf/train.yaml``."""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.cli import app
from src.cli import ranks
from src.runs import launch
from src.runs import processes
from src.runs import report
from src.runs.start import (
    adopt_model,
    check_epoch,
    check_text,
    different_model,
    different_optimizer,
    different_values,
    steps_of_schedule,
)
from src.data.config import DataConfig
from src.files import remove_folder
from src.interop.locate import problems_of_weights
from src.model.config import GPTConfig
from src.runs.record import RunRecord, read_record
from src.cli.resume import COMMAND, command_line, requeue, resumed_overrides
from src.cli.streams import lasting_output
from src.training.trainer import build_trainer, go_on_logging
from src.training.config import CheckpointConfig, EvalConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainerLimits
from src.checkpoint.interruption import Interrupted, Interruption

if TYPE_CHECKING:  # a wrong command line is answered without the seconds that these imports take
    from lightning.pytorch import Trainer

    from src.data.datamodule import TextDataModule
    from src.training.module import PretrainingModule

log = logging.getLogger(__name__)

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
    checked, found = app.check_sections(cfg, SECTIONS)
    if found:  # the rest relies on each number being sound by itself
        return found
    top, model, data, trainer, schedule, optimizer = (
        checked[key] for key in ("", "model", "data", "trainer", "schedule", "optimizer")
    )
    if not (top.weights or top.ckpt_path):  # which bring their own model
        found += model_problems(model, data)
    found += _foreign_arguments(config["trainer"])
    for group in "callbacks", "logger":
        for name, node in config[group].items():
            if node is not None and not (isinstance(node, dict) and "_target_" in node):
                found.append(f"{group}.{name}={node} has no _target_ to build: ~{group}.{name}")
    found += launch.problems_of_devices(config["trainer"])
    if schedule.name != "constant":
        steps = trainer.max_steps
        if steps > 0 and (problem := schedule.problem_of_length(steps, f"trainer.max_steps={steps}")):
            found.append(problem)
        if steps == trainer.max_epochs == -1:
            found.append(
                f"trainer.max_epochs=-1 leaves schedule={schedule.name} without an end: "
                f"trainer.max_steps=<n> or schedule=constant"
            )
        for key in ("initial_lr", "min_lr"):
            if (getattr(schedule, key) or 0) > optimizer.learning_rate:
                found.append(
                    f"schedule.{key}={getattr(schedule, key)} is above "
                    f"optimizer.learning_rate={optimizer.learning_rate}: schedule.{key}=0"
                )
    if top.tokens_per_step and not (top.weights or top.ckpt_path):
        _, problem = accumulation(cfg, launch.planned_count(config["trainer"]))
        found += [problem] if problem else []
    if top.ckpt_path is not None and not top.resume and not Path(top.ckpt_path).is_file():
        found.append(
            f"ckpt_path={top.ckpt_path} is no file (seen from {Path.cwd()}): "
            f"ckpt_path=<run folder>/checkpoints/last.ckpt"
        )
    if top.weights is not None and not top.resume:
        found += problems_of_weights(top.weights)
    return found


def _foreign_arguments(trainer: dict[str, Any]) -> list[str]:
    """Which keys that ``conf/trainer`` does not have Lightning's Trainer does not have either, a line each."""
    new = set(trainer) - set(OmegaConf.load(app.CONF / "trainer" / "default.yaml"))
    if not new:
        return []
    import inspect

    from lightning.pytorch import Trainer

    return [
        f"trainer.{key} is no argument of Lightning's Trainer: leave +trainer.{key} away"
        for key in sorted(new - set(inspect.signature(Trainer).parameters))
    ]


def accumulation(cfg: DictConfig, count: int) -> tuple[int, str | None]:
    """How many batches of ``count`` processes make ``cfg.tokens_per_step``, or why no number does."""
    asked, batch = cfg.tokens_per_step, cfg.data.batch_size * cfg.data.context_length * count
    batches, left = divmod(asked, batch)
    if left:
        nearest = max(round(asked / batch), 1) * batch
        return 0, (
            f"tokens_per_step={asked} is no multiple of the {batch} tokens of a batch (data.batch_size * "
            f"data.context_length * processes): tokens_per_step={nearest}"
        )
    if cfg.trainer.accumulate_grad_batches not in (1, batches):
        given = cfg.trainer.accumulate_grad_batches
        return 0, (
            f"trainer.accumulate_grad_batches={given} is not what tokens_per_step={asked} needs, {batches}: "
            f"trainer.accumulate_grad_batches=1"
        )
    return batches, None


def model_problems(model: GPTConfig, data: DataConfig, weights: str | Path | None = None) -> list[str]:
    """Why the windows of ``data`` are nothing for the model, which ``weights`` may have brought, a line each."""
    found, longest = [], model.context_length
    if model.vocab_size < 50257:
        cure = "weights=<a model of 50,257 tokens>" if weights else "model.vocab_size=50257"
        found.append(f"model.vocab_size={model.vocab_size} is less than the tokenizer's 50257: {cure}")
    if data.context_length is None or data.context_length > longest:
        cure = "" if weights else f"model.context_length={data.context_length}, or "
        found.append(
            f"data.context_length={data.context_length} is more than the model's {longest}: "
            f"{cure}data.context_length={longest}"
        )
    return found


def train(cfg: DictConfig, folder: Path) -> Run:
    """Train as ``cfg`` says and leave everything in ``folder``; with ``cfg.resume``, go on with the run in it.

    Raises:
        ValueError: the problems of the config, all at once; a text that is missing, unreadable or too short; a folder
            that already holds a run; a checkpoint of another model, text or batch; a run that made no optimizer step;
            memory that ran out; a data worker that died.
        OSError: a disk that is full or cannot be written to.
        Interrupted: SIGTERM, SIGINT, SIGUSR1 or SIGHUP, once the step under way is finished and saved.
    """
    if problems := find_problems(cfg):
        raise ValueError("\n".join(problems))
    started = time.perf_counter()
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    if cfg.resume and Path(cfg.resume).resolve() != folder.resolve():
        raise ValueError(f"resume={cfg.resume} is not the run folder {folder}: resume={folder}")
    config = OmegaConf.to_container(cfg, resolve=True)
    speaks = processes.rank() == 0
    command = os.environ.get(COMMAND) or command_line(overrides)
    record = RunRecord(folder, command, overrides, config, resumed=bool(cfg.resume), speaks=speaks)
    with Interruption(speaks) as interruption, closing(record):
        try:
            run = _train(cfg, folder, record, interruption)
        except BaseException as error:
            stopped = isinstance(error, Interrupted)
            outcome = {
                "status": "interrupted" if stopped else "failed",
                "error": error.signal.name if stopped else f"{type(error).__name__}: {error}",
                "seconds": record.seconds_before + time.perf_counter() - started,
            }
            with suppress(OSError):  # what went wrong first is told, not that the disk is too full to note it
                record.update(**outcome)
            if stopped:
                report.print_interrupted(error, folder)
                if speaks:
                    requeue(error)
                raise
            if not ranks.sweeping():  # whose table tells of every job
                record.discard_untrained()
            if explained := report.explain(error, cfg, folder):
                raise ValueError(explained) from error
            raise
        record.update(
            status="checked" if cfg.dry_run else "completed",
            seconds=record.seconds_before + time.perf_counter() - started,
        )
        if cfg.dry_run and not ranks.sweeping():
            record.discard_untrained()
    report.print_summary(run)
    return run


def _train(cfg: DictConfig, folder: Path, record: RunRecord, interruption: Interruption) -> Run:
    from lightning.pytorch import seed_everything

    from src.interop.weights import read_weights
    from src.checkpoint.find import make_last, newest_good_checkpoint
    from src.device import device_name, keep_freed_memory
    from src.training.finite_guard import MAX_ROLLBACKS, NonFiniteError
    from src.training.optim import batches_per_epoch, planned_steps

    if not (cfg.weights or cfg.ckpt_path):
        _accumulate(cfg)
    path, checkpoint = _find_checkpoint(cfg, folder)
    if cfg.weights and path is None:
        model, weights = read_weights(cfg.weights)
        _adopt(cfg, asdict(model), cfg.weights)
    if cfg.weights or cfg.ckpt_path or cfg.tokens_per_step:
        record.update(config=OmegaConf.to_container(cfg, resolve=True))
    trainer = build_trainer(cfg, folder, interruption)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    seed_everything(cfg.seed, verbose=False)
    share = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    datamodule = instantiate(
        cfg.data, eval_batches=cfg.eval.batches, accumulate=trainer.accumulate_grad_batches, **share
    )
    datamodule.prepare_data()
    datamodule.setup()
    batches = len(datamodule.train_dataloader())
    steps = planned_steps(trainer, batches)
    _check_length(cfg, steps)
    tokens = steps * datamodule.step_windows * cfg.data.context_length
    datamodule.eval_tokens = EvalConfig(**cfg.eval).resolved_max_tokens(tokens)
    if checkpoint and cfg.eval.max_tokens is None:  # the same windows as before, however long the run is now
        datamodule.eval_tokens = checkpoint.get("run", {}).get("eval_tokens", datamodule.eval_tokens)
    if checkpoint:
        check_text(checkpoint, path, datamodule.fixed_values())
        check_epoch(checkpoint, path, batches_per_epoch(trainer, batches) * datamodule.batch_windows)
        if checkpoint["global_step"] >= steps and (record.completed_before or not cfg.resume):
            raise ValueError(
                f"{path} is at step {checkpoint['global_step']} of {steps:,}, there is nothing left to do: "
                f"trainer.max_epochs=<more> or trainer.max_steps=<more>"
            )

    module = build_module(cfg)
    module.schedule_steps = steps_of_schedule(cfg, checkpoint, steps)
    if cfg.weights and path is None:
        module.net.load_state_dict(weights)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if trainer.checkpoint_callbacks:
        _check_disk(folder, 3 * 4 * parameters)  # weights and two moments, in float32
    if cfg.resume and not cfg.dry_run:
        if checkpoint and path.parent == folder / "checkpoints" and processes.rank() == 0:
            make_last(path)
        report.print_changes(read_record(folder), OmegaConf.to_container(cfg, resolve=True))
        go_on_logging(trainer, checkpoint.get("global_step", -1))
        record.start(checkpoint["global_step"] if checkpoint else 0)
    record.update(
        data_sha256=datamodule.corpus_sha256,
        parameters=parameters,
        device=device_name(trainer.strategy.root_device),
        precision=str(trainer.precision),
    )
    if checkpoint:
        log.info("going on from step %d of %s", checkpoint["global_step"], path)
    run = Run(folder, trainer, module, datamodule, record.values)
    report.print_start_card(run, cfg, steps)
    processes.wait_for_all()
    if cfg.dry_run:
        return run

    for rollbacks in itertools.count():
        try:
            return _fit(run, cfg, path, record)
        except NonFiniteError as error:
            if cfg.finite_guard != "rollback" or rollbacks == MAX_ROLLBACKS:
                raise
            found = _shared_checkpoint(lambda: newest_good_checkpoint(folder / "checkpoints"))
            what = str(error).split(": optimizer.learning_rate")[0]
            if found is None:
                cure = "no checkpoint to go back to yet: checkpoint.every_steps=<few>"
                raise NonFiniteError(f"{what}; {cure}", error.batches) from None
            path, checkpoint = found
            log.warning("%s", what)
            log.warning("back to step %d of %s, leaving that text out", checkpoint["global_step"], path)
            module.skipped_batches |= set(error.batches)
            record.update(skipped_batches=sorted(module.skipped_batches))
            run.trainer = build_trainer(cfg, folder, interruption)
            go_on_logging(run.trainer, checkpoint["global_step"])


def _fit(run: Run, cfg: DictConfig, path: Path | None, record: RunRecord) -> Run:
    from src.callbacks.throughput import Throughput

    trainer, module, datamodule = run.trainer, run.module, run.datamodule
    evaluating = trainer.limit_val_batches != 0
    for logger in trainer.loggers:
        logger.log_hyperparams(report.hyperparameters(cfg, record.values))
    before = math.inf  # the validation loss of step 0
    if path is None and evaluating:
        trainer.validate(module, datamodule=datamodule, verbose=False)
        before = module.evaluated["val/loss"]
        if not cfg.weights:
            report.judge_initial_loss(before, module.net.config.vocab_size)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
    finally:
        record.trained |= module.steps_made > 0
        speed = next((callback for callback in trainer.callbacks if isinstance(callback, Throughput)), None)
        with suppress(OSError):
            record.update(
                optimizer_steps=trainer.global_step,
                tokens_seen=module.tokens_seen,
                tokens_per_second=speed and speed.tokens_per_second,
            )
    if not module.steps_made and trainer.global_step < trainer.estimated_stepping_batches:
        raise ValueError(
            f"no optimizer step was made, the run is at step {trainer.global_step}: "
            f"trainer.max_epochs=<more>, trainer.max_steps=<more> or a longer trainer.max_time"
        )
    if evaluating and module.evaluated_step != trainer.global_step:
        trainer.validate(module, datamodule=datamodule, verbose=False)
    report.judge_best_loss(trainer, before, module.evaluated.get("val/loss", -math.inf))
    losses = {"train_loss": module.evaluated.get("train/eval_loss"), "val_loss": module.evaluated.get("val/loss")}
    for key, loss in losses.items():
        if loss is not None and not math.isfinite(loss):
            raise ValueError(
                f"the run diverged, its {key} is {loss}: "
                f"optimizer.learning_rate=<less than {cfg.optimizer.learning_rate}>"
            )
    val_loss = losses["val_loss"]
    record.update(**losses, val_perplexity=None if val_loss is None else math.exp(min(val_loss, 700)))
    return run


def build_module(cfg: DictConfig) -> PretrainingModule:
    """What ``cfg`` trains, its parameters drawn from ``cfg.seed``."""
    import torch

    from src.training.module import PretrainingModule

    torch.manual_seed(cfg.seed)
    config = OmegaConf.to_container(cfg, resolve=True)
    module = PretrainingModule(config["model"], config["optimizer"], config["schedule"], cfg.seed)
    module.net.checkpoint_activations = cfg.activation_checkpointing
    if cfg.compile:
        module.net.compile()
    return module


def _find_checkpoint(cfg: DictConfig, folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from, or another one where that is damaged, and what it holds."""
    from src.checkpoint.find import good_checkpoint, newest_good_checkpoint

    def look() -> tuple[Path, dict[str, Any]] | None:
        found = None
        if cfg.resume:
            found = newest_good_checkpoint(folder / "checkpoints")
            if found is None and any(folder.glob("checkpoints/*.ckpt")):
                raise ValueError(
                    f"resume={cfg.resume} has no checkpoint that can be read: hydra.run.dir=<a new folder>"
                )
            if found is None:
                log.info("%s has no checkpoint yet: starting it again", folder)
        return good_checkpoint(Path(cfg.ckpt_path)) if found is None and cfg.ckpt_path else found

    found = _shared_checkpoint(look)
    if found is None:
        return None, {}
    path, checkpoint = found
    if cfg.trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches={cfg.trainer.overfit_batches} is a check that cannot be continued: "
            f"trainer.overfit_batches=0"
        )
    if cfg.weights or cfg.ckpt_path:
        _adopt(cfg, checkpoint["hyper_parameters"]["model"], path)
    before = checkpoint["hyper_parameters"]
    problems = different_model(cfg, before["model"], path) + different_optimizer(cfg, before["optimizer"], path)
    _refuse(problems + different_values(cfg, checkpoint, path))
    return path, checkpoint


def _shared_checkpoint(look: Callable[[], tuple[Path, dict[str, Any]] | None]) -> tuple[Path, dict[str, Any]] | None:
    """What ``look`` finds on rank 0, for all processes of the run."""
    from src.checkpoint.find import read_checkpoint

    looked = []
    path = processes.from_rank_zero(lambda: looked.append(look()) or (looked[0] and str(looked[0][0])))
    if looked:
        return looked[0]
    return path and (Path(path), read_checkpoint(Path(path)))


def _adopt(cfg: DictConfig, model: dict[str, Any], source: Path | str) -> None:
    """Let the model be that of ``source``, unless another was asked for."""
    _refuse(adopt_model(cfg, model, source))
    checked, _ = app.check_sections(cfg, {"model": GPTConfig, "data": DataConfig})
    _refuse(model_problems(checked["model"], checked["data"], source))
    _accumulate(cfg)  # batches of the length that is known now


def _accumulate(cfg: DictConfig) -> None:
    if cfg.tokens_per_step:
        batches, problem = accumulation(cfg, processes.world_size())
        _refuse([problem] if problem else [])
        cfg.trainer.accumulate_grad_batches = batches


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _check_length(cfg: DictConfig, steps: float) -> None:
    if not steps:
        raise ValueError(
            f"trainer.limit_train_batches={cfg.trainer.limit_train_batches} and "
            f"trainer.overfit_batches={cfg.trainer.overfit_batches} leave no batch to train on: "
            f"trainer.limit_train_batches=null trainer.overfit_batches=0"
        )
    schedule = ScheduleConfig(**cfg.schedule)
    if math.isfinite(steps) and (problem := schedule.problem_of_length(steps, f"the run's {steps} optimizer steps")):
        raise ValueError(f"{problem} or a larger trainer.max_epochs")


def _check_disk(folder: Path, checkpoint_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * checkpoint_bytes:  # the one that is kept, and the next one beside it
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, two checkpoints take {2 * checkpoint_bytes / 1e9:.1f} GB: free "
            f"some, hydra.run.dir=<a folder on another disk> or trainer.enable_checkpointing=false"
        )


def _run(cfg: DictConfig) -> float | None:
    """One Hydra job; its objective is the final validation loss."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if processes.world_size() == 1 and (count := launch.devices_here(OmegaConf.to_container(cfg.trainer))) > 1:
            ranks.start_ranks(count, folder)
            return read_record(folder).get("val_loss")
        if processes.rank():
            processes.be_quiet()
        return train(cfg, folder).record.get("val_loss")
    except BaseException as error:
        error.told = processes.reported_elsewhere(error) or getattr(error, "told", False)
        raise
    finally:
        processes.ignore_signals()
        kept = ranks.sweeping() or (folder / "run.json").exists()
        if not kept and processes.rank() == 0:
            app.close_log_files(folder)
            remove_folder(folder, ".hydra", f"{HydraConfig.get().job.name}.log")


if __name__ == "__main__":
    with lasting_output():
        app.launch("train", _run, find_problems, resumed_overrides, ranks.agree_on_arguments)
