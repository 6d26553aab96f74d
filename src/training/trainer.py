"""The Trainer and the module of a run."""

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from src.checkpoint.callbacks import RunCheckpoints
from src.checkpoint.interruption import Interruption
from src.checkpoint.plugin import SealedCheckpointIO
from src.checkpoint.position import RunPosition
from src.device import pick_accelerator, pick_precision
from src.kernels.install import use_fast_kernels
from src.kernels.training import compile_training, recompute_activations
from src.model.architectures import ARCHITECTURES
from src.model.gpt import GPT
from src.training.config import TrainConfig
from src.training.evaluation import NEVER, EvaluationSchedule
from src.training.finite_guard import FiniteGuard
from src.training.module import PretrainingModule
from src.training.strategy import FullyShardedStrategy

IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*LeafSpec.*is deprecated.*",
    "Checkpoint directory .* exists and is not empty.*",
    "The dirpath has changed.*",
    "You're resuming from.*",
    ".*recommended to use .*sync_dist.*",  # what is logged is reduced over all ranks already
)


def build_trainer(
    config: TrainConfig,
    folder: Path,
    interruption: Interruption,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    world_size: int = 1,
) -> Trainer:
    """Lightning's Trainer with the arguments in ``config.trainer``, our evaluation schedule, gradient guard and
    checkpoints, and ``callbacks`` and ``loggers`` that watch; ``folder`` is its root folder."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the start card and the summary say it
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # TensorBoard's own switch to work without TensorFlow, which takes ten seconds to import where it is installed.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))

    options = config.trainer.model_dump()
    guard = FiniteGuard(options.pop("gradient_clip_val"), options.pop("gradient_clip_algorithm"))
    own: list[Callback] = [RunPosition(), guard]
    if options["val_check_interval"] is None and options["check_val_every_n_epoch"] is None:
        options["val_check_interval"] = NEVER
        own.append(EvaluationSchedule(config.eval))
    elif isinstance(options["val_check_interval"], float) and options["check_val_every_n_epoch"] is None:
        options["check_val_every_n_epoch"] = 1  # a share of an epoch, as in Lightning
    checkpoints: list[Callback] = []
    if options["enable_checkpointing"]:
        times = config.checkpoint.model_dump(exclude={"in_parts"})
        checkpoints = [RunCheckpoints(folder / "checkpoints", **times, interruption=interruption)]
    accelerator = pick_accelerator(options["accelerator"])
    options["precision"] = options["precision"] or pick_precision(accelerator)
    options["max_epochs"] = config.trainer.epochs
    options["enable_progress_bar"] = False  # callbacks.console draws one over the whole run
    if options["strategy"] == "fsdp":
        options["strategy"] = FullyShardedStrategy(world_size, config.checkpoint.in_parts)
    elif options["strategy"] == "ddp" or world_size > 1:
        options["strategy"] = DDPStrategy(gradient_as_bucket_view=True)  # without: each gradient in memory twice
    options["plugins"] = [SealedCheckpointIO(), *(options.get("plugins") or [])]
    options = {"num_sanity_val_steps": 0, "enable_model_summary": False, **options}
    if options.get("deterministic"):  # then PyTorch would fill each new tensor, gigabytes of logits too, with NaN
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    trainer = Trainer(
        **options, callbacks=[*own, *callbacks, *checkpoints], logger=list(loggers) or False, default_root_dir=folder
    )
    # The run handles signals itself, and its ranks agree once per step: Lightning's handler would wait for all of them
    # in the middle of anything, and its own agreement for the GPU at each batch.
    trainer._signal_connector.register_signal_handlers = interruption.install
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def build_module(
    config: TrainConfig,
    device: str,
    total_steps: float | None = None,
    skip_batches: tuple[int, ...] = (),
    sharded: bool = False,
) -> PretrainingModule:
    """The module of ``config``, to be trained on ``device``; its parameters are drawn from ``config.seed``, and only
    when they are ``sharded`` where they will be."""
    torch.backends.cuda.enable_cudnn_sdp(config.attention == "auto")
    torch.manual_seed(config.seed)
    later = sharded and ARCHITECTURES[config.model.architecture] is GPT  # others may draw more than shard() does
    with torch.device("meta") if later else nullcontext():
        module = PretrainingModule(
            config.model, config.optimizer, config.schedule, config.seed, total_steps, skip_batches
        )
    if config.kernels == "fast":
        use_fast_kernels(module.net, device)
    if config.activation_checkpointing:
        recompute_activations(module.net)
    if config.compile:
        compile_training(module.net, by_block=sharded)
    return module


def continue_logs(trainer: Trainer, step: int) -> None:
    """Make the loggers of the run folder continue after ``step``; what was logged beyond it is logged again."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if resume := getattr(logger, "resume", None):  # metrics.csv and TensorBoard
            resume(step)
