"""The position of a run: whether a step is complete, and what a checkpoint says so that Lightning resumes exactly."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.tokenizer.table import to_json


class RunPosition(Callback):
    """Writes where a run stands into its checkpoints, with what they are of, and restores it exactly."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        write_position(trainer, checkpoint)
        metrics = pl_module.evaluated if pl_module.evaluated_step == trainer.global_step else {}
        write_run(trainer, checkpoint, pl_module.tokens_seen, metrics)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if data := own_data(trainer):
            rescale_position(checkpoint, data.windows_per_batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore_position(trainer)


def completes_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether batch ``batch_idx`` of the epoch ended an optimizer step, instead of only accumulating gradients. An
    epoch's last batch always does. For ``on_train_batch_end``."""
    batches = batch_idx + 1
    last = trainer.is_last_batch or batches == trainer.num_training_batches
    return last or batches % trainer.accumulate_grad_batches == 0


def write_position(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Rewrite the loops' counters in ``checkpoint`` to one of the three forms from which Lightning resumes exactly.

    The counters that Lightning saves depend on the hook that saves. Between two batches it has already counted the
    second one. After an epoch that was cut short it counts that epoch as finished.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    done = batch["current"]["processed"]
    epoch_over = done >= trainer.num_training_batches
    if epoch_over and epoch["current"]["processed"] < epoch["current"]["ready"]:
        return  # in the validation after an epoch's last batch
    if epoch_over or not done:  # between two epochs
        for count in epoch["total"], epoch["current"]:
            count |= dict.fromkeys(("ready", "started", "completed"), count["processed"])
        return
    for count in epoch["total"], epoch["current"]:  # after a batch within an epoch
        before = count["ready"] - 1
        count |= {"started": count["ready"], "processed": before, "completed": before}
    for count in batch["total"], batch["current"]:
        processed = count["processed"]
        count |= {"ready": processed, "started": processed, "completed": processed - 1}
    batch["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1


def restore_position(trainer: Trainer) -> None:
    """Mark a finished epoch as finished, before the first batch of a resumed run. With ``max_steps``, Lightning would
    otherwise train it again."""
    epoch = trainer.fit_loop.epoch_progress.current.state_dict()
    if epoch["ready"] == epoch["processed"]:
        trainer.fit_loop.epoch_loop.restarting = False


def rescale_position(checkpoint: dict[str, Any], batch_windows: int) -> None:
    """Convert the counts of batches in ``checkpoint`` to batches of ``batch_windows`` windows, for a run that resumes
    with another world size. A checkpoint lies between two optimizer steps, so the result is a whole number."""
    before = checkpoint.get("batch_windows", batch_windows)
    if before == batch_windows:
        return

    def batches(count: int) -> int:
        return count * before // batch_windows

    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in progress["total"], progress["current"]:
        done = batches(count["processed"])
        over = count["completed"] - count["processed"]
        count |= {key: done for key in ("ready", "started", "processed")} | {"completed": done + over}


def own_data(trainer: Any) -> Any | None:
    """The data module if it knows the order of its batches, as this project's does; None for a user's own."""
    return trainer.datamodule if hasattr(trainer.datamodule, "fixed_values") else None


def write_run(trainer: Trainer, checkpoint: dict[str, Any], tokens_seen: int, metrics: dict[str, float]) -> None:
    """Add to ``checkpoint`` a description of the run: its step, tokens and ``metrics``, its text and how that was
    split, its tokenizer, the windows that every evaluation scores, and what a resumed run must not change."""
    checkpoint["run"] = {
        "step": trainer.global_step,
        "tokens_seen": tokens_seen,
        "precision": str(trainer.precision),
        "metrics": metrics,
    }
    data = own_data(trainer)
    if data is None:
        return
    scored = dict(zip(("val", "train"), map(len, data.evaluated_windows()), strict=True))
    checkpoint["run"] |= {
        "data": data.config.model_dump(mode="json"),
        "eval_tokens": data.eval_tokens,
        "eval_windows": scored,
    }
    checkpoint["tokenizer"] = to_json(data.tokenizer)  # None: GPT-2's
    checkpoint["fixed_values"] = {
        **data.fixed_values(),
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.limit_train_batches": trainer.limit_train_batches,
    }
    checkpoint["processes"] = trainer.world_size
    checkpoint["batch_windows"] = data.windows_per_batch
    checkpoint["epoch_windows"] = trainer.num_training_batches * data.windows_per_batch
