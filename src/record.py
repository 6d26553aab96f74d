"""``run.json``: what was run, on what, and what came out."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tiktoken", "numpy")


class RunRecord:
    """The record of one run, kept in its folder and replaced as a whole at every change.

    Making it claims the folder, so that no two runs can share one.

    Raises:
        ValueError: another run already has the folder.
    """

    def __init__(self, folder: Path, command: str, config: dict[str, Any]) -> None:
        self.path = folder / "run.json"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise ValueError(f"hydra.run.dir={folder} already holds a run: hydra.run.dir=<a new folder>") from None
        self.values: dict[str, Any] = {
            "status": "running",
            "command": command,
            "config": config,
            "versions": versions(),
            "git": git_revision(),
        }
        self.update()

    def update(self, **values: Any) -> None:
        self.values.update(values)
        part = self.path.with_suffix(".json.part")
        part.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")
        part.replace(self.path)


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
