"""``run.json``: what was run, on what, and what came out; and the claim to a run folder."""

import hmac
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.files import read_json, remove_folder, write_json

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tiktoken", "numpy")
LINGERING = 15  # seconds
KEY_BYTES = 32
KINDS = {  # of values that are read again
    **dict.fromkeys(("status", "command", "slurm_job"), str),
    **dict.fromkeys(("overrides", "resumed_at"), list),
    **dict.fromkeys(
        ("seconds", "optimizer_steps", "tokens_seen", "train_loss", "val_loss", "val_perplexity"), int | float
    ),
    "config": dict,
}
OUTPUTS = ("run.json", "metrics.csv", "samples.md", "checkpoints", "plots", "events.out.tfevents.*")


class RunRecord:
    """The record of one run, kept in its folder and replaced as a whole at every change.

    Making it claims the folder until :meth:`close` or the end of the process, so that no two runs can share one.
    ``resumed`` keeps what an earlier process recorded until :meth:`start`. With ``speaks=False``, in all processes of a
    run but one, nothing is claimed or written.

    Raises:
        ValueError: another process has the folder, or, unless ``resumed``, it holds a run.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        overrides: list[str],
        config: dict[str, Any],
        resumed: bool = False,
        speaks: bool = True,
    ) -> None:
        self.path = folder / "run.json"
        self.trained = False  # an optimizer step was made
        self._speaks, self._resumed = speaks, resumed
        self._lock = FileLock(folder / ".lock")
        if speaks:
            self._claim(folder, resumed)
        before = read_record(folder) if resumed else {}
        self.resumed_at = before.get("resumed_at", [])
        self.seconds_before = before.get("seconds", 0.0)
        self.completed_before = before.get("status") == "completed"
        self.values: dict[str, Any] = {
            "status": "running",
            "command": before.get("command", command),
            "overrides": overrides,
            "signature": signature(overrides) if speaks else None,
            "config": config,
            "versions": versions(),
            "git": git_revision(),
        }
        if "SLURM_JOB_ID" in os.environ:
            self.values["slurm_job"] = os.environ["SLURM_JOB_ID"]
        self._started = False
        if not resumed:
            self.start()

    def _claim(self, folder: Path, resumed: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:  # the data workers of a run that was killed hold its folder for some seconds more
            self._lock.acquire(timeout=LINGERING if resumed else 0)
        except Timeout:
            raise ValueError(
                f"{folder} is in use by another process: stop that, or hydra.run.dir=<a new folder>"
            ) from None
        if not resumed and (taken := [name for name in OUTPUTS if any(folder.glob(name))]):
            self._lock.release()
            raise ValueError(
                f"hydra.run.dir={folder} already holds a run ({', '.join(taken)}): resume={folder} to continue it, or "
                f"hydra.run.dir=<a new folder>"
            )

    def start(self, resumed_at: int | None = None) -> None:
        """From now on this process speaks for the run; ``resumed_at`` is the step that it continues."""
        self._started = self._speaks
        if resumed_at is not None:
            self.resumed_at.append(resumed_at)
            self.values["resumed_at"] = self.resumed_at
        self.update()

    def update(self, **values: Any) -> None:
        self.values.update(values)
        if self._started:
            write_json(self.path, self.values)

    def discard_untrained(self) -> None:
        """Leave nothing behind, unless the run made an optimizer step, was resumed, or wrote ``non_finite.json``."""
        folder = self.path.parent
        if self._speaks and not (self._resumed or self.trained or (folder / "non_finite.json").exists()):
            self._started = False
            remove_folder(folder, *OUTPUTS, ".lock")

    def close(self) -> None:
        self._lock.release()


def read_record(folder: Path) -> dict[str, Any]:
    """What ``run.json`` in ``folder`` says, without damaged values; nothing where it is missing or cannot be read."""
    return {
        key: value
        for key, value in read_json(folder / "run.json").items()
        if key not in KINDS or (isinstance(value, KINDS[key]) and not isinstance(value, bool))
    }


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


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def git_revision() -> str | None:
    """The checked-out commit, with ``-dirty`` where files differ from it; None outside of a repository."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None
