"""Tasks of lm-eval by name: their files, their data, their scores."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.tasks import TaskManager

from src.config import refuse

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from src.evaluation.harness import HarnessLM

BOOTSTRAP = 1000  # samples for the standard error of metrics without a formula, such as perplexity
FEWSHOT_SEED = 1234  # lm-eval's own, which published results use


def load_tasks(names: Sequence[str], folder: str | None = None, key: str = "tasks") -> TaskDict:
    """The tasks, groups and tags called ``names``, which may be patterns such as ``mmlu_*``, with their data. Task
    files in ``folder`` come before lm-eval's own. ``key`` is the override that named them.

    Raises:
        ValueError: an unknown name, a broken task file, or data that cannot be downloaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = _manager(names, folder)
    known = find_names(names, manager.all_tasks, key)
    asked = f"{key}=[{','.join(names)}]"
    try:
        loaded = manager.load(known)
    except ConnectionError as error:
        raise ValueError(
            f"{asked}: the data cannot be downloaded ({_line(error)}); run it once with network access, which fills "
            f"Hugging Face's cache"
        ) from error
    except Exception as error:  # a task file may be wrong in any way
        raise ValueError(
            f"{asked} cannot be loaded ({type(error).__name__}: {_line(error)}); use another task, or correct its file"
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _manager(names: Sequence[str], folder: str | None) -> TaskManager:
    if folder is not None:
        folder = os.path.expanduser(folder)
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):  # lm-eval's own task files are about 14,000, which takes seconds
            return own
    return TaskManager(include_path=folder)


def find_names(names: Sequence[str], known: Sequence[str], key: str = "tasks") -> list[str]:
    """The ``known`` names that match ``names``, which may be patterns.

    Raises:
        ValueError: one line for each of ``names`` that matches none, with the nearest that is known.
    """
    found, unknown = [], []
    for name in names:
        matching = [name] if name in known else fnmatch.filter(known, name)
        found += matching
        if not matching:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
            unknown.append(f"{key}=[{name}] is not a task of lm-eval; use '{key}=[{''.join(nearest)}]'")
    refuse(unknown)
    return list(dict.fromkeys(found))


def run_tasks(tasks: TaskDict, model: HarnessLM, limit: int | None = None) -> dict[str, float]:
    """Each metric of ``tasks`` as ``<task>_<metric>``, with its standard error and the number of examples, which are
    the first ``limit`` of each task. A metric of a filtered answer is called ``<task>_<metric>_<filter>``."""
    from lm_eval.evaluator import evaluate  # after load_tasks has said what is wrong

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork a process per core for the standard errors
    found: Any = evaluate(model, tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    scores: dict[str, float] = {}
    for name, metrics in found["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and "," in metric:
                scores[f"{name}_{metric.removesuffix(',none').replace(',', '_')}"] = value
        if name in found["n-samples"]:
            scores[f"{name}_examples"] = found["n-samples"][name]["effective"]
    return scores


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
