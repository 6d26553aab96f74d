"""The Trainer that a config asks for."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from src.training.config import EvalConfig
from src.checkpoint.interruption import Interruption

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

DEFAULT_EPOCHS = 10


def build_trainer(cfg: DictConfig, folder: Path, interruption: Interruption) -> Trainer:
    from lightning.pytorch import Trainer

    from src.checkpoint.callbacks import RunCheckpoints
    from src.training.evaluation import NEVER, EvaluationSchedule
    from src.checkpoint.plugin import SealedCheckpointIO
    from src.device import pick_accelerator, pick_precision
    from src.training.sharded import FullyShardedStrategy

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the start card and the summary say it in our words
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*is deprecated.*",
        "Checkpoint directory .* exists and is not empty.*",
        "The dirpath has changed.*",
        "You're resuming from.*",
        ".*training_step. returned .None.*",
        ".*recommended to use .*sync_dist.*",  # what is logged is summed over all processes already
    ):
        warnings.filterwarnings("ignore", message=message)
    options = OmegaConf.to_container(cfg.trainer, resolve=True)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback is not None]
    if options["val_check_interval"] is None and options["check_val_every_n_epoch"] is None:
        options["val_check_interval"] = NEVER
        callbacks.insert(0, EvaluationSchedule(EvalConfig(**cfg.eval)))
    elif isinstance(options["val_check_interval"], float) and options["check_val_every_n_epoch"] is None:
        options["check_val_every_n_epoch"] = 1  # a share of an epoch, as in Lightning
    if options["enable_checkpointing"]:
        callbacks.append(RunCheckpoints(folder / "checkpoints", **cfg.checkpoint, interruption=interruption))
    accelerator = pick_accelerator(options["accelerator"])
    if options["precision"] is None:
        options["precision"] = pick_precision(accelerator)
    if options["max_epochs"] is None and options["max_steps"] == -1:
        options["max_epochs"] = DEFAULT_EPOCHS
    options["enable_progress_bar"] = False  # callbacks.console draws one over the whole run
    if options["strategy"] == "fsdp":
        options["strategy"] = FullyShardedStrategy()
    options["plugins"] = [SealedCheckpointIO(), *(options["plugins"] or [])]
    # TensorBoard's own switch for working without TensorFlow, which takes ten seconds to import where it is installed.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
    loggers = [instantiate(logger, save_dir=str(folder)) for logger in cfg.logger.values() if logger is not None]
    trainer = Trainer(**options, callbacks=callbacks, logger=loggers or False, default_root_dir=folder)
    # The run listens for signals itself, and its processes agree once per step: Lightning's handler would wait for all
    # of them in the middle of anything, and its own agreement for the GPU at each batch.
    trainer._signal_connector.register_signal_handlers = interruption.install
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def go_on_logging(trainer: Trainer, step: int) -> None:
    """Let the curves in the run folder go on behind ``step``; what was logged beyond it is logged again."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if hasattr(logger, "resume"):  # metrics.csv and the dashboard; others have no memory in the run folder
            logger.resume(step)
