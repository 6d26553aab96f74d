"""Files that are replaced whole or not at all, and folders that leave nothing behind."""

import csv
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """The path of a new file ``<path>.part``, which becomes ``path`` if the block succeeds and is removed otherwise.
    A reader of ``path`` sees the old content or the new, never a mixture; where either is a folder, for an instant
    nothing. One process at a time may write.

    ``durable`` waits until the new content is on the disk, so that it survives a power failure.
    """
    part = path.with_name(path.name + ".part")
    remove(part)  # of a process that was killed; it may be another name of a file that is in use
    try:
        yield part
        if durable:
            flush(part)
        old = path.with_name(path.name + ".old")
        if path.exists() and (path.is_dir() or part.is_dir()):  # no folder can be replaced at once
            remove(old)
            path.rename(old)
        part.replace(path)
        remove(old)
        if durable:
            flush(path.parent)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Remove the file or folder at ``path``, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and path.is_dir():  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(path: Path, name: Path) -> None:
    """Give the file at ``path``, or those in the folder, a second name, which replaces what ``name`` was. A file system
    without hard links gets a copy."""
    with replacing(name) as part:
        if path.is_dir():
            shutil.copytree(path, part, copy_function=_link)
        else:
            _link(path, part)


def _link(path: str | Path, name: str | Path) -> None:
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def write_text(path: Path, text: str) -> None:
    """Replace what is at ``path`` by ``text`` in UTF-8, line ends as they are."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON. Infinities and NaN, which JSON lacks, become the strings ``"inf"``, ``"-inf"`` and
    ``"nan"``, which ``float`` reads."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``, or an empty one if there is no regular file or it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> tuple[list[dict[str, str]], bool]:
    """The valid rows of a CSV file with a column ``step``, and whether more of it is damaged than a last line that a
    kill cut short."""
    if not path.is_file():
        return [], True
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        columns, *rows = csv.reader(lines, strict=True)
    except (ValueError, csv.Error):
        return [], bool(lines)
    if "step" not in columns or len(set(columns)) < len(columns):
        return [], True
    step = columns.index("step")
    valid = [
        len(row) == len(columns) and bool(re.fullmatch("[0-9]{1,18}", row[step])) and "\ufffd" not in "".join(row)
        for row in rows
    ]
    return [dict(zip(columns, row, strict=True)) for row in itertools.compress(rows, valid)], not all(valid[:-1])


def remove_folder(folder: Path, *names: str) -> None:
    """Remove the files and folders in ``folder`` that match ``names`` (glob patterns). Then remove ``folder`` and its
    parents within the working folder, as long as they are empty."""
    for path in [path for name in names for path in folder.glob(name)]:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()
    around = [parent for parent in folder.absolute().parents if Path.cwd() in parent.parents]
    with suppress(OSError):  # stops at the first that is not empty
        for empty in [folder, *around]:
            empty.rmdir()


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder for ``~``. That of a user who does not exist stays, where ``Path.expanduser``
    raises a RuntimeError."""
    return Path(os.path.expanduser(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
