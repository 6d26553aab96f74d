"""Where a run stands, written into a checkpoint so that Lightning goes on exactly there."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class RunPosition(Callback):
    """Writes where a run stands into its checkpoints, with what they are of, and restores it exactly."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_position(trainer, checkpoint)
        metrics = pl_module.evaluated if pl_module.evaluated_step == trainer.global_step else {}
        write_run(trainer, checkpoint, pl_module.tokens_seen, metrics)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if data := own_data(trainer):
            rescale_position(checkpoint, data.batch_windows)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore_position(trainer)


def write_position(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Put the loops' counters in ``checkpoint`` into one of the three forms that Lightning continues exactly.

    Lightning's own depend on the hook that saves: between two batches it has counted the second one already, and after
    an epoch that was cut short it takes that epoch for finished.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    done = batch["current"]["processed"]
    epoch_over = done >= trainer.num_training_batches
    if epoch_over and epoch["current"]["processed"] < epoch["current"]["ready"]:
        return  # in the validation behind an epoch's last batch
    if epoch_over or not done:  # between two epochs
        for count in epoch["total"], epoch["current"]:
            count |= dict.fromkeys(("ready", "started", "completed"), count["processed"])
        return
    for count in epoch["total"], epoch["current"]:  # behind a batch within an epoch
        before = count["ready"] - 1
        count |= {"started": count["ready"], "processed": before, "completed": before}
    for count in batch["total"], batch["current"]:
        processed = count["processed"]
        count |= {"ready": processed, "started": processed, "completed": processed - 1}
    batch["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1


def restore_position(trainer: Trainer) -> None:
    """Before the first batch of a continued run: a finished epoch is finished, also where ``max_steps`` bounds it."""
    epoch = trainer.fit_loop.epoch_progress.current
    if epoch.ready == epoch.processed:
        trainer.fit_loop.epoch_loop.restarting = False


def rescale_position(checkpoint: dict[str, Any], batch_windows: int) -> None:
    """Count in batches of ``batch_windows`` windows, for a run that goes on with another number of processes. The
    checkpoint lies between two optimizer steps, or two epochs, so it is between two batches in either count."""
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


def own_data(trainer: Trainer) -> Any | None:
    """The data module, if it is this project's, which knows the order of its batches; users may bring their own."""
    return trainer.datamodule if hasattr(trainer.datamodule, "fixed_values") else None


def write_run(trainer: Trainer, checkpoint: dict[str, Any], tokens_seen: int, metrics: dict[str, float]) -> None:
    """Put what ``checkpoint`` is of into it: its step, tokens and ``metrics``, the text and how that was cut, and which
    windows every evaluation scores; and what a continued run cannot change without losing its meaning."""
    checkpoint["run"] = {
        "step": trainer.global_step,
        "tokens_seen": tokens_seen,
        "precision": str(trainer.precision),
        "metrics": metrics,
    }
    data = own_data(trainer)
    if data is None:
        return
    scored = dict(zip(("val", "train"), map(len, data.eval_windows()), strict=True))
    checkpoint["run"] |= {
        "data": data.config.model_dump(mode="json"),
        "eval_tokens": data.eval_tokens,
        "eval_windows": scored,
    }
    checkpoint["fixed_values"] = {
        **data.fixed_values(),
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.limit_train_batches": trainer.limit_train_batches,
    }
    checkpoint["processes"] = trainer.world_size
    checkpoint["batch_windows"] = data.batch_windows
    checkpoint["epoch_windows"] = trainer.num_training_batches * data.batch_windows
