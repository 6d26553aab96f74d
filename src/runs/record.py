"""``run.json``: what was run, on what, and what came out; and the claim to a run folder."""

from __future__ import annotations

import hmac
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.checkpoint.interruption import Interrupted
from src.files import read_json, remove_folder, replacing, write_json, write_text
from src.runs.processes import job_id
from src.training.config import TrainConfig

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from src.data.datamodule import TextDataModule

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tiktoken", "numpy")
LINGERING = 15  # seconds
KEY_BYTES = 32
KINDS = {  # of values that are read again
    **dict.fromkeys(("status", "command", "job_id", "git", "device", "precision", "data_sha256"), str),
    **dict.fromkeys(("overrides", "resumed_at"), list),
    **dict.fromkeys(("seconds", "optimizer_steps", "tokens_seen", "train_loss", "val_loss"), int | float),
    **dict.fromkeys(("val_perplexity", "best_val_loss", "val_tokens", "parameters"), int | float),
    **dict.fromkeys(("tokens_per_second",), int | float),
    **dict.fromkeys(("config", "versions"), dict),
}
OUTPUTS = ("run.json", "tokenizer.json", "metrics.csv", "samples.md", "checkpoints", "plots", "events.out.tfevents.*")
OUTPUTS += ("code.diff", "wandb", "wandb_run_id", "mlflow_run_id")


class RunRecord:
    """The record of one run, kept in its folder and replaced as a whole at every change.

    As a context it claims the folder, so that no two runs can share one, and at its end records how the run ended. A
    run that trained nothing leaves nothing. A resumed run keeps what an earlier process recorded until :meth:`start`.
    With ``writes=False``, on all ranks but 0, nothing is claimed or written.

    Raises:
        ValueError: another process uses the folder, or it holds a run and ``config.resume`` is not set.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        command: str,
        overrides: list[str],
        writes: bool = True,
        in_sweep: bool = False,
    ) -> None:
        self.path = folder / "run.json"
        self.trained = False  # an optimizer step was made
        self.loggers: list[Any] = []  # those that have finish(status) are told how the run ended
        resumed = bool(config.resume)
        from filelock import FileLock  # it imports asyncio, and a wrong command line is answered without

        self._writes, self._resumed, self._in_sweep = writes, resumed, in_sweep
        self._lock = FileLock(folder / ".lock")
        self._began = time.perf_counter()
        if writes:
            self._claim(folder)
        before = read_record(folder) if resumed else {}
        self.resumed_at = before.get("resumed_at", [])
        self.seconds_before = before.get("seconds", 0.0)
        self.completed_before = before.get("status") == "completed"
        self.values: dict[str, Any] = {
            "status": "running",
            "command": before.get("command", command),
            "overrides": overrides,
            "signature": signature(overrides) if writes else None,
            "config": config.model_dump(mode="json"),
            "versions": versions(),
            "git": git_revision(),
            **{key: value for key, value in before.items() if key == "best_val_loss"},
        }
        if job := job_id():
            self.values["job_id"] = job
        self._started = False
        if not resumed:
            self.start()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            with suppress(*([OSError] if error else [])):  # the first error is reported, not a full disk after it
                self.update(**_outcome(error), seconds=self.seconds_before + time.perf_counter() - self._began)
            for logger in self.loggers:
                try:
                    getattr(logger, "finish", lambda status: None)(self.values["status"])
                except Exception as failure:
                    log.warning("%s: %s", type(logger).__name__, failure)
            nothing_trained = self.values["status"] == "checked" or (error and not isinstance(error, Interrupted))
            if nothing_trained and not self._in_sweep:  # whose table lists every job
                self._discard_untrained()
        finally:
            self._lock.release()

    def _claim(self, folder: Path) -> None:
        from filelock import Timeout

        folder.mkdir(parents=True, exist_ok=True)
        try:  # the data workers of a run that was killed hold its folder for some seconds more
            self._lock.acquire(timeout=LINGERING if self._resumed else 0)
        except Timeout:
            raise ValueError(
                f"{folder} is in use by another process; stop that, or use hydra.run.dir=<a new folder>"
            ) from None
        found = [path for name in OUTPUTS for path in folder.glob(name)]
        if strange := [path for path in found if not (path.is_file() or path.is_dir())]:
            self._lock.release()
            raise ValueError(
                f"{strange[0]} is neither a file nor a folder; remove it, or use hydra.run.dir=<a new folder>"
            )
        if not self._resumed and (taken := [name for name in OUTPUTS if any(folder.glob(name))]):
            self._lock.release()
            raise ValueError(
                f"hydra.run.dir={folder} already holds a run ({', '.join(taken)}); use resume={folder} to continue it, "
                f"or hydra.run.dir=<a new folder>"
            )

    def start(self, resumed_at: int | None = None) -> None:
        """From now on the record is this process's; ``resumed_at`` is the step that it continues. What its code has
        that the commit has not is kept beside it."""
        self._started = self._writes
        if self._writes:
            (code := self.path.with_name("code.diff")).unlink(missing_ok=True)
            if changed := git_diff("HEAD"):
                write_text(code, changed)
        if resumed_at is not None:
            self.resumed_at.append(resumed_at)
            self.values["resumed_at"] = self.resumed_at
        self.update()

    def update(self, **values: Any) -> None:
        self.values.update(values)
        if self._started:
            write_json(self.path, self.values)

    def describe(self, config: TrainConfig, trainer: Trainer, data: TextDataModule, parameters: int) -> None:
        """Record what trains on what; ``config`` may have the model of weights by now. A tokenizer other than GPT-2's
        goes into a file beside the record."""
        from src.device import device_name
        from src.tokenizer.table import FILE, to_json

        if self._started and (table := to_json(data.tokenizer)):
            with replacing(self.path.with_name(FILE)) as part:
                part.write_text(table, encoding="utf-8")

        self.update(
            config=config.model_dump(mode="json"),
            data_sha256=data.corpus_sha256,
            parameters=parameters,
            device=device_name(trainer.strategy.root_device),
            precision=str(trainer.precision),
        )

    def _discard_untrained(self) -> None:
        """Leave nothing, unless the run made an optimizer step, was resumed, or wrote ``non_finite.json``."""
        folder = self.path.parent
        if self._writes and not (self._resumed or self.trained or (folder / "non_finite.json").exists()):
            self._started = False
            remove_folder(folder, *OUTPUTS, ".lock")


def _outcome(error: BaseException | None) -> dict[str, str]:
    if error is None:
        return {}
    if isinstance(error, Interrupted):
        return {"status": "interrupted", "error": error.signal.name}
    from src.device import is_out_of_memory

    return {"status": "oom" if is_out_of_memory(error) else "failed", "error": f"{type(error).__name__}: {error}"}


def read_record(folder: Path) -> dict[str, Any]:
    """What ``run.json`` in ``folder`` says, without damaged values; nothing where it is missing or cannot be read."""
    return {
        key: value
        for key, value in read_json(folder / "run.json").items()
        if key not in KINDS or _is_valid(value, KINDS[key])
    }


def recorded_runs() -> list[Path]:
    """The folders of all runs and jobs under ``outputs``, the one that changed last first."""
    changed = {}
    for record in (*Path("outputs").glob("*/*/run.json"), *Path("outputs").glob("*/*/*/run.json")):
        with suppress(OSError):  # a run that trained nothing may have just removed it
            changed[record.parent] = record.stat().st_mtime
    return sorted(changed, key=lambda folder: changed[folder], reverse=True)


def _is_valid(value: Any, kind: Any) -> bool:
    finite = not isinstance(value, int | float) or abs(value) <= sys.float_info.max  # not true of NaN
    return isinstance(value, kind) and not isinstance(value, bool) and finite


def signature(overrides: list[str]) -> str | None:
    """What shows that ``overrides`` are this user's own: their HMAC under a key that only the user can read. None
    where no key can be kept."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(state, "gpt2-lightning", "key")
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            suppress(FileExistsError),
            os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as new,
        ):
            new.write(secrets.token_bytes(KEY_BYTES))
        key = file.read_bytes()
    except (OSError, RuntimeError):  # no home
        return None
    return hmac.new(key, json.dumps(overrides).encode(), "sha256").hexdigest() if len(key) == KEY_BYTES else None


def is_signed(record: dict[str, Any], overrides: list[str]) -> bool:
    """Whether ``record`` has this user's signature of ``overrides``."""
    return record.get("signature") == signature(overrides) is not None


def versions() -> dict[str, str]:
    import importlib.metadata

    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def git_revision() -> str | None:
    """The checked-out commit, with ``-dirty`` where files differ from it; None outside of a repository."""
    return (_git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "").strip() or None


def git_diff(revision: str) -> str | None:
    """What differs in ``src`` and ``conf`` from ``revision``; None if the repository does not have it, or is none."""
    own = ("--no-color", "--no-ext-diff", "--no-textconv", "--full-index", "-U3", "--src-prefix=a/", "--dst-prefix=b/")
    return _git("-c", "diff.algorithm=myers", "diff", *own, revision, "--", "src", "conf")  # whatever the user set


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
