"""The two plots of a run: loss and learning rate over epochs, and perplexity over tokens."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from src.checkpoint.position import completes_step
from src.evaluation.figures import BLUE, SKY, VERMILLION, label_log_axis, new_figure, short, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS = {  # metric: label, how it is drawn
    "val/loss": ("validation", {"color": VERMILLION, "marker": "s", "markersize": 5, "markerfacecolor": "white"}),
    "train/eval_loss": ("training, evaluated", {"color": BLUE, "marker": "o", "markersize": 2.5, "linestyle": "--"}),
}
MOST_POINTS = 4000
EVERY_SECONDS = 60  # between drawings, each of which takes one or two seconds


class LossPlot(Callback):
    """Draws ``plots/loss.png`` and ``plots/perplexity.png`` in the trainer's root folder and gives them to each logger
    that has ``log_image(key, images, step)`` with the arguments of Lightning's ``WandbLogger``. It draws at the end of
    training, and after an evaluation or an epoch if ``EVERY_SECONDS`` have passed.

    The checkpoint keeps the data, so the curves of a resumed run are complete: every evaluation, and the tokens seen,
    loss and learning rate of every optimizer step. With more than ``MOST_POINTS`` steps, each point is the mean over 2,
    4, 8, ... consecutive steps.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []  # of evaluations
        self.points: list[list[float]] = []  # tokens seen, loss, learning rate
        self.steps_per_point = 1
        self.pending: list[list[float]] = []  # the steps of the next point
        self._unread: list[list[Any]] = []
        self._next_drawing = 0.0

    def state_dict(self) -> dict[str, Any]:
        self._read()
        lists = {"history": [*self.history], "points": [*self.points], "pending": [*self.pending]}
        return {**lists, "steps_per_point": self.steps_per_point}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update({key: state_dict[key] for key in self.state_dict() if key in state_dict})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._next_drawing = time.monotonic() + EVERY_SECONDS

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = trainer.callback_metrics
        if completes_step(trainer, batch_idx) and "train/loss" in metrics:
            self._unread.append([pl_module.tokens_seen, metrics["train/loss"], metrics["lr"]])
        if len(self._unread) == 100:
            self._read()

    def _read(self) -> None:
        """Add the latest steps. Reading a metric waits for the device, so many are read at once."""
        for tokens, loss, rate in self._unread:
            self._add([tokens, loss.item(), rate.item()])
        self._unread = []

    def _add(self, step: list[float]) -> None:
        self.pending.append(step)
        if len(self.pending) == self.steps_per_point:
            self.points.append(_mean(self.pending))
            self.pending = []
        if len(self.points) == MOST_POINTS:
            self.points = [_mean(pair) for pair in zip(self.points[::2], self.points[1::2], strict=True)]
            self.steps_per_point *= 2

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        losses = {key: trainer.callback_metrics[key].item() for key in SPLITS if key in trainer.callback_metrics}
        if trainer.sanity_checking or not losses:
            return
        tokens = pl_module.tokens_seen
        self.history = [old for old in self.history if old["tokens"] < tokens] + [{"tokens": tokens, **losses}]
        self._draw(trainer, pl_module, now=trainer.state.fn != "fit")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, now=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: Trainer, pl_module: Any, now: bool = True) -> None:
        from matplotlib.image import imread

        self._read()
        if not self.points or not (now or time.monotonic() >= self._next_drawing):
            return
        epochs, steps = pl_module.epochs_seen, trainer.global_step
        unit, done = ("epochs", epochs) if epochs > 1 else ("optimizer steps", steps)
        figures = {"loss": loss_figure(self.points, self.history, unit, done / pl_module.tokens_seen)}
        if self.history:
            figures["perplexity"] = perplexity_figure(self.history)
        folder = Path(trainer.default_root_dir, "plots")
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png")
            for logger in trainer.loggers:
                if log_image := getattr(logger, "log_image", None):
                    image = imread(folder / f"{name}.png")[..., :3]  # (H, W, 3) without transparency
                    log_image(f"plots/{name}", [image], step=steps)
        self._next_drawing = time.monotonic() + EVERY_SECONDS


def loss_figure(points: list[list[float]], history: list[dict[str, float]], unit: str, per_token: float) -> Figure:
    """The losses of every step and of both splits with the learning rate below, over ``unit``. The upper axis shows
    tokens seen; one token is ``per_token`` units. ``points`` and ``history`` are those of :class:`LossPlot`."""
    from matplotlib.ticker import MaxNLocator

    figure, (upper, lower) = new_figure(height=4.2, nrows=2, sharex=True, height_ratios=[4, 1])
    tokens, losses, rates = np.array(points).T
    at = tokens * per_token
    thin = {"linewidth": 0.7, "alpha": 0.5} if len(points) > 20 else {"linewidth": 1.2}
    upper.plot(at, losses, color=SKY, label="training, each step", **thin)
    if len(points) > 20:
        upper.plot(at, smooth(losses), color=SKY, linewidth=1.6, label="training, smoothed")
    _draw_splits(upper, history, per_token, lambda loss: loss)
    upper.set_ylabel("loss (nats per token)")
    upper.legend(fontsize=8)
    of_tokens = upper.secondary_xaxis("top", functions=(lambda x: x / per_token, lambda x: x * per_token))
    of_tokens.set_xlabel("tokens seen")
    of_tokens.xaxis.set_major_formatter(short)
    lower.plot(at, rates, color="black", linewidth=1)
    lower.set_yticks([0, max(rates)], ["0", f"{max(rates):.2g}"])
    lower.set(xlabel=unit, ylabel="learning\nrate")
    lower.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=unit != "epochs"))
    lower.xaxis.set_major_formatter("{x:,g}")
    return figure


def perplexity_figure(history: list[dict[str, float]]) -> Figure:
    """The perplexity of both splits over tokens seen, on a logarithmic scale."""
    figure, axes = new_figure()
    found = _draw_splits(axes, history, 1, lambda loss: math.exp(min(loss, 100)))
    axes.set(yscale="log", xlabel="tokens seen", ylabel="perplexity")
    label_log_axis(axes.yaxis, min(found), max(found))
    axes.xaxis.set_major_formatter(short)
    axes.legend(fontsize=8)
    return figure


def _draw_splits(axes: Any, history: list[dict[str, float]], per_token: float, shown: Any) -> list[float]:
    found = []
    for key, (label, style) in SPLITS.items():
        evaluated = [(point["tokens"] * per_token, shown(point[key])) for point in history if key in point]
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), label=label, linewidth=1, **style)
            found += [value for _, value in evaluated]
    return found


def _mean(rows: Any) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
