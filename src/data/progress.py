"""The progress of long work: a bar on a terminal, a line in the log every 10 seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

LINE_EVERY = 10  # seconds between two lines

Progress = Callable[[float], None]  # takes how much more is done


@contextmanager
def progress(what: str, total: float | None, unit: str) -> Iterator[Progress]:
    """A function that takes how much more is done of ``total``, which may be unknown (None). Both count in ``unit``."""
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn

    count = "{task.completed:,.0f}" + ("" if total is None else " of {task.total:,.0f}")
    columns = (*Bar.get_default_columns(), TextColumn(f"{count} {unit}"))
    started = said = time.monotonic()
    with Bar(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)

        def advance(more: float) -> None:
            nonlocal said
            bar.advance(task, more)
            done, now = bar.tasks[0].completed, time.monotonic()
            if bar.disable and now - said >= LINE_EVERY:
                said, rate = now, done / (now - started)
                left = "" if total is None or not rate else f", {(total - done) / rate:.0f} s left"
                log.info("%s: %s %s, %s per second%s", what, f"{done:,.0f}", unit, f"{rate:,.0f}", left)

        yield advance
