"""Rows, each a dictionary of the same columns, as CSV, as Markdown, and as lines for a terminal."""

import csv
import io
from pathlib import Path
from typing import Any

from src.config import shown
from src.files import write_text

FORMATS = {  # of numbers, by column
    **dict.fromkeys(("best_val_loss", "val_loss", "best_bits_per_byte", "bits_per_byte"), ".4f"),
    **dict.fromkeys(("val_tokens", "parameters", "steps", "tokens", "seconds", "tokens_per_second"), ",.0f"),
    "val_perplexity": ",.1f",
}


def cell(key: str, value: Any) -> str:
    """``value``, which may come from anywhere, as a short text for the column ``key``."""
    if key in FORMATS and isinstance(value, int | float):
        return format(value, FORMATS[key])
    return "" if value is None else value if isinstance(value, str) and value.isprintable() else shown(value)


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write ``rows`` as ``<path>.csv``, values as they are, and as ``<path>.md``."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path.with_name(f"{path.name}.csv"), buffer.getvalue())
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(*item) for item in row.items()] for row in rows)]
    text = "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)
    write_text(path.with_name(f"{path.name}.md"), text)


def in_columns(rows: list[dict[str, Any]], width: int) -> list[str]:
    """``rows`` as lines of about ``width`` characters, in as many blocks as that takes, each with the first column."""
    texts = [[key, *(cell(key, row[key]) for row in rows)] for key in rows[0]]
    first, *others = [[text.rjust(max(map(len, column))) for text in column] for column in texts]
    blocks = [[first]]
    for column in others:
        if len(blocks[-1]) > 1 and sum(len(each[0]) + 2 for each in [*blocks[-1], column]) > width + 2:
            blocks.append([first])
        blocks[-1].append(column)
    return ["  ".join(line) for block in blocks for line in [*zip(*block, strict=True), ()]]
