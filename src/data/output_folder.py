"""What a folder of shards was begun with, and whether a preparation may continue there."""

import re
from pathlib import Path
from typing import Any

import tiktoken

from src.data.config import PrepareConfig
from src.data.manifest import MANIFEST, WHOLE, Part, parts_in, read_manifest
from src.data.remote import RemoteFile
from src.data.shard_writer import new_manifest
from src.data.shards import HEADER


def manifest_for(
    config: PrepareConfig, sources: list[Path | RemoteFile], folder: Path, tokenizer: tiktoken.Encoding
) -> dict[str, Any]:
    """The manifest of what ``folder`` is to hold: the one in it if there is one, else a new one. The manifests of other
    parts must agree with it in the settings and in the names of the files.

    Raises:
        ValueError: the folder holds something else, or was begun with other settings or sources.
    """
    part = Part.parse(config.part)
    keys = "text_key", "shard_tokens", "val_tokens", "max_tokens", "special_tokens"
    settings = {"name": config.name or folder.resolve().name, **{key: getattr(config, key) for key in keys}}
    settings["part"] = None if part.count == 1 else f"<number>/{part.count}"
    new = new_manifest(settings, tokenizer, described(part.of(sources)))
    begun = {one: read_manifest(folder, one) for one in (part, *parts_in(folder))}
    found = {one: manifest for one, manifest in begun.items() if manifest is not None}
    problem = None if found else _foreign_files(folder)
    for manifest in found.values():
        problem = problem or _difference(manifest, new)
    if problem:
        raise ValueError(f"output={folder} {problem}; use output=<a new folder>")
    for key, value in settings.items():
        for manifest in found.values():
            asked, there = ("null" if v is None else v for v in (value, manifest["settings"].get(key)))
            if asked != there:
                raise ValueError(
                    f"{key}={asked} is not what output={folder} was begun with; use {key}={there}, or "
                    f"output=<a new folder>"
                )
    for one, manifest in found.items():
        known, now = manifest["sources"], described(one.of(sources))
        if one != part:  # whether the files of another part have changed is for that part to find out
            known, now = ([{"file": source["file"]} for source in files] for files in (known, now))
        if problem := _other_sources(known, now) or (one == part and _lost(manifest, folder)):
            again = f"rm {folder / one.manifest} and repeat the command, or " if one == part != WHOLE else ""
            raise ValueError(f"output={folder} {problem}; use {again}output=<a new folder>")
    return found.get(part, new)


def _foreign_files(folder: Path) -> str | None:
    left = re.compile(r"manifest(-\d+-of-\d+)?\.json\.part")  # by a process that was killed
    others = sorted(file.name for file in folder.iterdir() if not (file.name[0] == "." or left.fullmatch(file.name)))
    return f"holds something else ({', '.join(others[:3])})" if others else None


def _difference(found: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Why the manifest ``found`` cannot be continued as ``new``, whatever the settings and the sources."""
    if not found.keys() >= new.keys() - {"part", "end"}:
        return f"has a {MANIFEST} of another program or version"
    return None if found["tokenizer"] == new["tokenizer"] else "was begun with another tokenizer"


def _other_sources(known: list[dict[str, Any]], now: list[dict[str, Any]]) -> str | None:
    if changed := [source["file"] for source in now if source not in known]:
        return f"was begun with other sources, {changed[0]} is new or has changed"
    return None if known == now else "was begun with more sources or in another order"


def _lost(manifest: dict[str, Any], folder: Path) -> str | None:
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != HEADER + 2 * shard["tokens"]:
            return f"has lost {path.name} or a part of it"
    return None


def described(files: list[Path | RemoteFile]) -> list[dict[str, Any]]:
    return [file.described if isinstance(file, RemoteFile) else _described_locally(file) for file in files]


def _described_locally(file: Path) -> dict[str, Any]:
    try:
        stat = file.stat()
    except FileNotFoundError:
        raise ValueError(f"source={file} is gone; use source=<where it is now>") from None
    return {"file": str(file.absolute()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
