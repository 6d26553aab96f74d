"""Which files a path names: itself, those in a folder, those that a glob pattern matches."""

import glob
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.files import expanded


def find_files(path: str, key: str, endings: tuple[str, ...]) -> list[Path]:
    """The file at ``path``, the files that it matches as a glob pattern, or the files in it with one of ``endings`` if
    it is a folder, sorted.

    Links to folders are followed. A file that can be reached in several ways is found once, under its own name if
    possible.

    Raises:
        ValueError: no file, or one that cannot be read. The message blames the override ``key``.
    """
    place = expanded(path)
    try:
        if place.is_dir():
            found = (Path(folder, name) for folder, names in _folders(place) for name in names)
            files = _once(file for file in found if file.name.endswith(endings))
            if not files:
                kinds = " or ".join(endings)
                raise ValueError(f"{key}={path} is a folder without a {kinds} file; use {key}='{path}/**/*.<ending>'")
            return files
        if place.exists():
            if not place.is_file():
                raise ValueError(f"{key}={path} is a device or a pipe; use {key}=<a file, folder or glob>")
            return [place]
        files = _once(_matches(str(place)))
    except OSError as error:
        what = error.filename or path
        raise ValueError(
            f"{key}={path} cannot be read ({what}: {error.strerror}); use {key}=<readable files>"
        ) from None
    if not files:
        raise ValueError(f"{key}={path} does not exist (seen from {Path.cwd()}); use {key}=<file, folder or glob>")
    return files


def _once(files: Iterable[Path]) -> list[Path]:
    found: dict[str, Path] = {}
    for file in sorted({file for file in files if file.is_file()}, key=lambda file: (_linked(file), file)):
        found.setdefault(os.path.realpath(file), file)
    return sorted(found.values())


def _linked(path: Path) -> bool:
    return os.path.realpath(path) != os.path.abspath(path)


def _folders(top: Path) -> Iterator[tuple[str, list[str]]]:
    """``top`` and the folders in it with the names of their files, each once, those reached through links last."""
    seen, tops = set(), [str(top)]
    while tops:
        links = []
        for folder, inner, names in itertools.chain.from_iterable(os.walk(top, onerror=_raise) for top in tops):
            here = os.path.realpath(folder)
            if here in seen:
                inner.clear()
                continue
            seen.add(here)
            links += [link for name in inner if os.path.islink(link := os.path.join(folder, name))]
            yield folder, names
        tops = sorted(links)


def _raise(error: OSError) -> None:
    raise error


def _matches(pattern: str) -> Iterator[Path]:
    """The matches of ``pattern``. :func:`glob.glob` alone would follow a link to a parent folder endlessly."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    number = parts.index("**")
    for top in glob.glob(os.path.join("", *parts[:number])) if number else ["."]:
        for folder, _ in _folders(Path(top)):
            if not any(part.startswith(".") for part in Path(folder).relative_to(top).parts):
                yield from _matches(os.path.join(glob.escape(folder), *(parts[number + 1 :] or ["*"])))
