"""The parts of a run between its start and its record: data, fitting, and the final losses."""

from __future__ import annotations

import math
from contextlib import suppress

from lightning.pytorch import Trainer

from src.callbacks.throughput import Throughput
from src.data.datamodule import TextDataModule
from src.runs.record import RunRecord
from src.runs.report import hyperparameters, judge_best_loss, judge_initial_loss
from src.runs.start import Start
from src.training.module import PretrainingModule
from src.training.optim import batches_per_epoch, planned_steps


def build_data(start: Start, trainer: Trainer) -> tuple[TextDataModule, int, float]:
    """The data module of the run, with its text read, the batches of an epoch and the optimizer steps of the run.

    Raises:
        ValueError: a text that cannot be read, is too short, or leaves no step; a schedule that does not fit the run.
    """
    config = start.config
    data = TextDataModule(
        tokenizer=start.tokenizer or config.tokenizer,
        **{**dict(config.data), "context_length": config.context_length, "seed": config.seed},
        eval_batches=config.eval.batches,
        accumulate=trainer.accumulate_grad_batches,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )
    data.prepare_data()
    data.setup()
    batches = batches_per_epoch(trainer, len(data.train_dataloader()))
    steps = planned_steps(trainer, batches)
    if not steps:
        limits = {key: getattr(config.trainer, key) for key in ("limit_train_batches", "overfit_batches")}
        asked = " and ".join(f"trainer.{key}={value}" for key, value in limits.items())
        raise ValueError(
            f"{asked} leave no batch to train on; use trainer.limit_train_batches=null trainer.overfit_batches=0"
        )
    if math.isfinite(steps) and (
        problem := config.schedule.problem_of_length(steps, f"the run's {steps} optimizer steps")
    ):
        raise ValueError(f"{problem} or a larger trainer.max_epochs")
    tokens = config.eval.resolved_max_tokens(steps * data.windows_per_step * config.context_length)
    if config.eval.max_tokens is None:  # a resumed run scores the same windows as before, however long it is now
        tokens = start.checkpoint.get("run", {}).get("eval_tokens", tokens)
    data.limit_evaluation(tokens)
    return data, batches, steps


def fit(start: Start, trainer: Trainer, module: PretrainingModule, data: TextDataModule, record: RunRecord) -> None:
    """Train, with an evaluation before the first step and after the last, and record the outcome.

    Raises:
        ValueError: no optimizer step was made, or the run diverged.
    """
    evaluating = trainer.limit_val_batches != 0
    for logger in trainer.loggers:
        logger.log_hyperparams(hyperparameters(start.config, record.values, data.windows_per_step))
    before = math.inf  # the validation loss of step 0
    if start.path is None and evaluating:
        trainer.validate(module, datamodule=data, verbose=False)
        before = module.evaluated["val/loss"]
        record.update(best_val_loss=before)
        if start.weights is None:
            judge_initial_loss(before, module.net.config.vocab_size)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start.path, weights_only=True)
    finally:
        record.trained |= module.steps_made > 0
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  # Lightning does not declare it
        speed = next((callback for callback in callbacks if isinstance(callback, Throughput)), None)
        with suppress(OSError):
            record.update(
                best_val_loss=_best_loss(record, trainer, module),
                optimizer_steps=trainer.global_step,
                tokens_seen=module.tokens_seen,
                tokens_per_second=speed and speed.tokens_per_second,
            )
    if not module.steps_made and trainer.global_step < trainer.estimated_stepping_batches:
        raise ValueError(
            f"no optimizer step was made, the run is at step {trainer.global_step}; "
            f"use trainer.max_epochs=<more>, trainer.max_steps=<more> or a longer trainer.max_time"
        )
    if evaluating and module.evaluated_step != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    best = _best_loss(record, trainer, module)
    judge_best_loss(before, best)
    losses = {"train_loss": module.evaluated.get("train/eval_loss"), "val_loss": module.evaluated.get("val/loss")}
    for key, loss in losses.items():
        if loss is not None and not math.isfinite(loss):
            rate = start.config.optimizer.learning_rate
            raise ValueError(f"the run diverged, its {key} is {loss}; use optimizer.learning_rate=<less than {rate}>")
    val_loss = losses["val_loss"]
    perplexity = None if val_loss is None else math.exp(min(val_loss, 700))
    tokens = module.evaluated_tokens.get("val")
    record.update(best_val_loss=best, **losses, val_perplexity=perplexity, val_tokens=tokens)


def _best_loss(record: RunRecord, trainer: Trainer, module: PretrainingModule) -> float | None:
    """The lowest ``val/loss`` of the run's evaluations: of this process and of those it resumes."""
    known = [getattr(callback, "best", math.inf) for callback in trainer.checkpoint_callbacks]
    best = min(record.values.get("best_val_loss") or math.inf, module.best_val_loss, *known)
    return best if math.isfinite(best) else None
