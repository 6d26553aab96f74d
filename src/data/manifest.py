"""The manifest of the shards in a folder, and the manifests of parts that are made independently of each other."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from src.files import replacing

MANIFEST = "manifest.json"
COUNTS = {"tokens": 0, "documents": 0, "characters": 0, "skipped": 0}  # of the text before the manifest's ``end``

File = TypeVar("File")


class Part(NamedTuple):
    """The part ``number`` of ``count``, from 1, of the source files. By default it is all of them."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Part":
        """The part that an override like ``part=3/16`` names; None is all of the files.

        Raises:
            ValueError: it names none.
        """
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not found:
            raise ValueError(f"part={text} is not <number>/<parts>; use part=1/16")
        part = cls(int(found[1]), int(found[2]))
        if not 1 <= part.number <= part.count:
            last = max(part.count, 1)
            raise ValueError(f"part={text} is none of 1/{last} to {last}/{last}; use part=1/{last}")
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def suffix(self) -> str:
        """What its files have in their names."""
        return "" if self.count == 1 else f"-{self.number:0{len(str(self.count))}}-of-{self.count}"

    @property
    def manifest(self) -> str:
        return f"manifest{self.suffix}.json"

    def of(self, files: list[File]) -> list[File]:
        """The files of this part: consecutive ones, in numbers that differ by at most one between the parts.

        Raises:
            ValueError: there are more parts than files.
        """
        if len(files) < self.count:
            most = f"{min(self.number, len(files))}/{len(files)}"
            raise ValueError(f"part={self} makes more parts than source has files, {len(files)}; use part={most}")
        first, last = (len(files) * number // self.count for number in (self.number - 1, self.number))
        return files[first:last]


WHOLE = Part()


def read_manifest(folder: Path, part: Part = WHOLE) -> dict[str, Any] | None:
    """The manifest in ``folder`` of the whole or of a part: None if there is none, {} if it cannot be read."""
    try:
        manifest = json.loads((folder / part.manifest).read_bytes())
        if isinstance(manifest, dict) and {"complete", "tokenizer", "shards"} <= set(manifest):
            return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    return {}


def write_manifest(folder: Path, manifest: dict[str, Any], part: Part = WHOLE) -> None:
    with replacing(folder / part.manifest, durable=True) as new:
        new.write_text(json.dumps(manifest, indent=2))


def parts_in(folder: Path) -> list[Part]:
    """The parts that have a manifest in ``folder``."""
    names = (re.fullmatch(r"manifest-(\d+)-of-(\d+)\.json", file.name) for file in folder.iterdir())
    return sorted(Part(int(name[1]), int(name[2])) for name in names if name)


def unfinished_parts(folder: Path) -> list[Part]:
    """The parts that ``folder`` lacks, of as many as one of those in it says."""
    counts = {part.count for part in parts_in(folder)}
    parts = (Part(number, count) for count in counts for number in range(1, count + 1))
    return [part for part in parts if not (read_manifest(folder, part) or {}).get("complete")]


def join_parts(folder: Path) -> None:
    """Write the manifest of all shards in ``folder``, by part, if every part is complete. One process at a time."""
    parts = parts_in(folder)
    if not parts or unfinished_parts(folder) or (folder / MANIFEST).exists():
        return
    manifests = [read_manifest(folder, part) or {} for part in parts]
    lists = {key: [entry for one in manifests for entry in one[key]] for key in ("sources", "shards")}
    counts = {key: sum(one[key] for one in manifests) for key in COUNTS}
    write_manifest(folder, {**manifests[0], **lists, **counts})
