"""The style of all figures: legible 3.3 inches or 400 pixels wide, in colors that color-blind readers tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SKY, BLUE, VERMILLION = "#56B4E9", "#0072B2", "#D55E00"  # Okabe & Ito 2008


def new_figure(width: float = 4.8, height: float = 3.6, **subplots: Any) -> tuple[Figure, Any]:
    """An empty figure, its size in inches at 200 dpi, and its axes as ``Figure.subplots`` returns them."""
    from matplotlib.figure import Figure  # without pyplot, so no display and no global state

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    axes = figure.subplots(**subplots)
    for each in np.ravel(axes):
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def short(count: float, _: Any = None) -> str:
    """Thousands separated, and 1,500,000 as ``1.5M``."""
    for size, unit in (1e9, "B"), (1e6, "M"):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:,g}"


def label_log_axis(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic ``axis`` with plain numbers. Its data lies between ``low`` and ``high``."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    near = high < 10 * low
    axis.set_major_locator(MaxNLocator(5) if near else LogLocator(subs=(1, 3) if high < 1e6 * low else (1,)))
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter(NullFormatter())


def smooth(values: np.ndarray) -> np.ndarray:
    """The running mean of ``values`` over a window of a 25th of them, which narrows towards the two ends."""
    at, half = np.arange(len(values)), max(len(values) // 50, 2)
    first = at - np.minimum(at, half)
    last = np.minimum(2 * at - first, len(values) - 1)
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)
