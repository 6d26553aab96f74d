"""The book's two plots: loss over epochs, perplexity over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS = {"train": ("train/eval_loss", "training"), "val": ("val/loss", "validation")}


class LossPlot(Callback):
    """Draws ``plots/loss.png`` and ``plots/perplexity.png`` in the trainer's root folder, and TensorBoard images, after
    every epoch and at the end, from the evaluations so far; the checkpoint keeps those, so a resumed curve is whole."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = {key: trainer.callback_metrics.get(key) for key, _ in SPLITS.values()}
        if trainer.sanity_checking or None in losses.values():
            return
        epoch = pl_module.epochs_seen
        point = {"epoch": epoch, "tokens": pl_module.tokens_seen, **{key: loss.item() for key, loss in losses.items()}}
        self.history = [old for old in self.history if old["tokens"] < point["tokens"]] + [point]
        if trainer.state.fn != "fit" and epoch:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._draw(trainer)

    @rank_zero_only
    def _draw(self, trainer: Trainer) -> None:
        if not self.history:
            return
        folder = Path(trainer.default_root_dir, "plots")
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in (
            ("loss", loss_figure(self.history)),
            ("perplexity", perplexity_figure(self.history)),
        ):
            figure.savefig(folder / f"{name}.png", dpi=120)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"plots/{name}", figure, trainer.global_step)


def loss_figure(history: list[dict[str, float]]) -> Figure:
    """Training and validation loss over epochs, with tokens seen on the upper axis."""
    figure, axes = _axes("loss (nats per token)")
    epochs = [point["epoch"] for point in history]
    for (key, label), style in zip(SPLITS.values(), ("-", "-."), strict=True):
        axes.plot(epochs, [point[key] for point in history], style, label=label)
    axes.set_xlabel("epochs")
    axes.legend()
    upper = axes.twiny()
    upper.plot([point["tokens"] for point in history], [point["val/loss"] for point in history], alpha=0)
    upper.set_xlabel("tokens seen")
    return figure


def perplexity_figure(history: list[dict[str, float]]) -> Figure:
    """Training and validation perplexity over tokens seen, on a logarithmic scale."""
    figure, axes = _axes("perplexity")
    tokens = [point["tokens"] for point in history]
    for (key, label), style in zip(SPLITS.values(), ("-", "-."), strict=True):
        axes.plot(tokens, [math.exp(min(point[key], 700)) for point in history], style, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("tokens seen")
    axes.legend()
    return figure


def _axes(ylabel: str):
    from matplotlib.figure import Figure  # draws without pyplot: no display, no global state

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes
