"""Files that are written whole or not at all, with the user's umask, and folders that leave nothing behind."""

import json
import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace what is at ``path`` by ``text``; whoever reads it meanwhile sees the old content or the new."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, which has no infinities and no NaN: they become the texts ``"inf"``, ``"-inf"`` and
    ``"nan"``, which ``float`` reads."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``; an empty one where there is no regular file or it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def remove_folder(folder: Path, *names: str) -> None:
    """Remove what ``names``, which may be patterns, fit in ``folder``, then, as far as they are empty, it and the
    folders around it in the working folder."""
    for path in [path for name in names for path in folder.glob(name)]:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()
    around = [parent for parent in folder.absolute().parents if Path.cwd() in parent.parents]
    with suppress(OSError):  # the first that is not empty ends it
        for empty in [folder, *around]:
            empty.rmdir()
