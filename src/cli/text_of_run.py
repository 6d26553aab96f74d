"""The text that belongs to weights: that of the run which trained them."""

import glob
import json
import os
from pathlib import Path
from typing import Any

from src.cli.latest import data_of_run, with_latest_weights
from src.cli.overrides import compose
from src.cli.quoting import as_meant, quoted
from src.cli.typed import typed
from src.data.config import DataConfig

# Keys of data that say neither what the text is nor how it is split.
OTHER_KEYS = {"prepare", "context_length", "stride", "shuffle", "shift", "num_workers", "seed"}
ANOTHER_TEXT = "use data=story, or data=text data.path=<a text>"


def with_data_of_run(overrides: list[str]) -> list[str]:
    """``overrides`` after those that name the text of the run that trained ``weights``, and how it is split. Values
    that ``overrides`` give themselves stay; with ``data`` among them nothing is added.

    Raises:
        ValueError: no ``data`` is given, and the weights come from no run, from runs on different texts, or from a run
            whose text is gone.
    """
    overrides = with_latest_weights(overrides)
    given = {override.split("=")[0].lstrip("+"): override.split("=", 1)[-1] for override in overrides}
    if "weights" not in given or "data" in given or {"-h", "--help"} & set(overrides):
        return overrides
    weights = f"weights={given['weights']}"
    several = given["weights"].split(",") if given["weights"][:1] not in ("'", '"') else [given["weights"]]
    texts = [data_of_run(as_meant(one)) for one in several]
    own = texts[0] if all(text == texts[0] for text in texts) else {}
    if not own and "data.path" not in given:
        reason = "were not trained on one text" if any(texts) else "do not say which text they were trained on"
        raise ValueError(f"{weights} {reason}; {ANOTHER_TEXT}")
    path = own.get("path")
    gone = path and not (os.path.exists(os.path.expanduser(path)) or glob.glob(path, recursive=True))
    if gone and "data.path" not in given:
        raise ValueError(
            f"data.path={path}, which {weights} was trained on, does not exist (seen from {Path.cwd()}); "
            f"use data.path=<where it is now>, or data=<another text>"
        )
    default = dict(typed(compose("evaluate", ["data.path=null"]).data, DataConfig))
    added = [
        f"++data.{key}={_as_value(own[key])}"
        for key in default
        if key in own.keys() - OTHER_KEYS and f"data.{key}" not in given and (key == "path" or own[key] != default[key])
    ]
    at = next(place for place, override in enumerate(overrides) if "=" in override)  # after Hydra's own flags
    return [*overrides[:at], *added, *overrides[at:]]


def _as_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_as_value, value))}]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)
