"""The two plots of a run: every step, every evaluation, whole after a resume, and no hindrance."""

import copy
import math

import pytest
from conftest import column, metrics_of

from src.callbacks.plots import MOST_POINTS, LossPlot, loss_figure, perplexity_figure
from src.checkpoint.find import read_checkpoint

WATCHED = ("data.batch_size=4", "~callbacks.text_samples", "logger=csv")


def kept(run, name="last"):
    return read_checkpoint(run.folder / "checkpoints" / f"{name}.ckpt")["callbacks"]["LossPlot"]


def size(run, name: str) -> tuple[int, int]:
    from matplotlib.image import imread

    return imread(run.folder / "plots" / f"{name}.png").shape[:2]


@pytest.fixture
def drawings(monkeypatch):
    """A list that gets the arguments of each drawing of the loss."""
    import src.callbacks.plots as loss_plot

    made, draw = [], loss_plot.loss_figure
    monkeypatch.setattr(loss_plot, "loss_figure", lambda *given: made.append(copy.deepcopy(given)) or draw(*given))
    return made


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_optimizer_step_and_every_evaluation_is_kept(tiny_run, accumulate):
    run = tiny_run(*WATCHED, f"trainer.accumulate_grad_batches={accumulate}", "trainer.max_steps=6",
                   "eval.every_steps=2")  # fmt: skip
    rows = metrics_of(run)
    assert kept(run)["points"] == [[row["tokens_seen"], row["train/loss"], row["lr"]] for row in rows[1:]]
    assert [point["tokens"] for point in kept(run)["history"]] == [64 * accumulate * step for step in (0, 2, 4, 6)]
    assert [point["val/loss"] for point in kept(run)["history"]] == pytest.approx(column(run, "val/loss"))
    sparse = tiny_run(*WATCHED, f"trainer.accumulate_grad_batches={accumulate}", "trainer.max_steps=6",
                      "trainer.log_every_n_steps=4", "eval.every_steps=2")  # fmt: skip
    assert kept(sparse)["points"] == kept(run)["points"]


def test_a_resumed_curve_is_whole(tiny_run, at_batch, tmp_path):
    common = (*WATCHED, "eval.every_steps=3", "checkpoint.every_steps=5")
    whole = tiny_run(*common)

    def die(module):
        raise RuntimeError("killed")

    at_batch(8, die)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_run(*common, folder=tmp_path / "cut")
    resumed = tiny_run(*common, resume=tmp_path / "cut")
    assert kept(resumed) == kept(whole)
    assert len(kept(whole)["points"]) == resumed.trainer.global_step


def test_a_long_curve_stays_small_and_does_not_know_where_it_was_interrupted():
    whole, cut = LossPlot(), LossPlot()
    for step in range(1, 20_001):
        if step in (17, 5_003, 12_345):
            state, cut = cut.state_dict(), LossPlot()
            cut.load_state_dict(state)
        for plot in whole, cut:
            plot._add([512 * step, math.exp(-step / 1000), 1e-3])
    assert cut.state_dict() == whole.state_dict()
    assert MOST_POINTS / 2 <= len(whole.points) <= MOST_POINTS
    assert whole.steps_per_point == 8
    first = [math.exp(-step / 1000) for step in range(1, 9)]
    assert whole.points[0] == pytest.approx([512 * 4.5, sum(first) / 8, 1e-3])
    assert len(whole.points) * 8 + len(whole.pending) == 20_000


@pytest.mark.parametrize(
    ("overrides", "files"),
    [
        (["trainer.max_steps=1"], {"loss", "perplexity"}),
        (["trainer.max_steps=3"], {"loss", "perplexity"}),
        (["trainer.max_epochs=2"], {"loss", "perplexity"}),
        (["trainer.max_steps=3", "trainer.limit_val_batches=0"], {"loss"}),
    ],
)
def test_drawn_once_at_the_end_of_a_short_run(tiny_run, drawings, overrides, files):
    run = tiny_run(*WATCHED, "eval.every_steps=1", *overrides)
    assert {path.stem for path in (run.folder / "plots").iterdir()} == files
    assert size(run, "loss") == (840, 960)  # 200 to the inch
    assert len(drawings) <= 2  # at the end of training, and of an evaluation behind it
    _, _, unit, per_token = drawings[-1]
    epochs = "trainer.max_epochs=2" in overrides
    assert unit == ("epochs" if epochs else "optimizer steps")
    assert per_token * run.module.tokens_seen == pytest.approx(2 if epochs else run.trainer.global_step)


def test_drawn_after_evaluations_where_time_has_passed(tiny_run, drawings, monkeypatch):
    monkeypatch.setattr("src.callbacks.plots.EVERY_SECONDS", 0)
    tiny_run(*WATCHED, "trainer.max_steps=6", "eval.every_steps=2")
    assert [len(points) for points, *_ in drawings][:3] == [2, 4, 6]


def test_what_the_figures_show():
    points = [[512 * step, 10 / step, 1e-3 * step] for step in range(1, 101)]
    history = [{"tokens": 512 * step, "train/eval_loss": 9.0, "val/loss": 10.0 - step / 50} for step in (0, 50, 100)]
    upper, lower = loss_figure(points, history, "epochs", 1 / 5120).axes
    lines = {line.get_label(): line for line in upper.lines}
    assert list(lines) == ["training, each step", "training, smoothed", "validation", "training, evaluated"]
    assert list(lines["training, each step"].get_ydata()) == [loss for _, loss, _ in points]
    assert list(lines["validation"].get_xdata()) == [0, 5, 10]
    assert len({line.get_color() for line in lines.values()}) == 3
    assert lines["validation"].get_marker() != lines["training, evaluated"].get_marker()
    smooth = lines["training, smoothed"].get_ydata()
    assert smooth[0] == 10
    assert smooth[50] == pytest.approx(sum(10 / step for step in range(49, 54)) / 5)
    (tokens,) = upper.child_axes
    tokens.figure.draw_without_rendering()
    assert "20,000" in [label.get_text() for label in tokens.get_xticklabels()]
    assert list(lower.lines[0].get_ydata()) == pytest.approx([rate for *_, rate in points])
    assert [label.get_text() for label in lower.get_yticklabels()] == ["0", "0.1"]

    figure = perplexity_figure(history)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert "10,000" in shown
    assert not any("^" in label for label in shown)


def test_perplexities_close_together_have_plain_numbers_too():
    figure = perplexity_figure([{"tokens": n, "val/loss": math.log(24 + n)} for n in range(4)])
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    shown = [float(label.get_text()) for label in figure.axes[0].get_yticklabels()]
    assert len([value for value in shown if low <= value <= high]) >= 3
