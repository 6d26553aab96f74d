"""An evaluation as figures and a table."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.evaluation.figures import BLUE, new_figure
from src.evaluation.losses import TextLoss
from src.tokenizer import token_bytes

if TYPE_CHECKING:
    import tiktoken
    from matplotlib.figure import Figure

BEFORE = 12  # tokens shown before a surprising one


def write_report(found: TextLoss, tokens: np.ndarray, tokenizer: tiktoken.Encoding, folder: Path) -> None:
    """Write ``plots/loss_by_position.png`` to ``folder``, and, if ``found`` has surprises, ``surprises.md``, a table,
    and ``plots/surprises.png``."""

    def text(part) -> str:
        whole = b"".join(token_bytes(int(token), tokenizer) for token in part)
        return repr(whole.decode(errors="replace"))[1:-1]

    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    loss_by_position(found.by_position).savefig(plots / "loss_by_position.png")
    if not found.surprises:
        return
    rows, labels = ["| loss | probability | before | token | likeliest instead |", "|---|---|---|---|---|"], []
    for surprise in found.surprises:
        before = text(tokens[max(surprise.at - BEFORE, 0) : surprise.at])
        token, expected = text([surprise.token]), text([surprise.expected])
        cells = [f"{part.replace('|', chr(92) + '|')}" for part in (before, token, expected)]
        shown = " | ".join(f"`` {cell} ``" for cell in cells)
        rows.append(f"| {surprise.loss:.2f} | {math.exp(-surprise.loss):.1e} | {shown} |")
        labels.append(f"{before[-30:]} [{token}]")
    (folder / "surprises.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks
        most_surprising(labels, [one.loss for one in found.surprises]).savefig(plots / "surprises.png")


def loss_by_position(means: np.ndarray) -> Figure:
    """Mean loss ``(T,)`` over the number of tokens of context, NaN where none was scored."""
    figure, axes = new_figure()
    axes.plot(np.arange(1, len(means) + 1), means, color=BLUE, linewidth=1)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("loss (nats per token)")
    return figure


def most_surprising(labels: list[str], losses: list[float]) -> Figure:
    """The tokens with the highest loss, each with the words before it, the highest at the top."""
    figure, axes = new_figure(6.4, 0.6 + 0.24 * len(labels))
    places = np.arange(len(labels))[::-1]
    axes.barh(places, losses, color=BLUE)
    axes.set_yticks(places, [label.replace("$", r"\$") for label in labels], fontsize=8, family="monospace")
    axes.set_xlabel("loss (nats)")
    return figure
