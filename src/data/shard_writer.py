"""Shards on disk that are filled one after another, and can be gone on with after a kill."""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data.shards import HEADER, MANIFEST, header

START = (0, 0, 0)
BLOCK = 2**20  # tokens copied at a time


class Chunk(NamedTuple):
    """Text to tokenise, ``None`` where a document begins, and the place behind it: number of the file, number of the
    record in it, characters of that record; and how many records before that were null."""

    pieces: list[str | None]
    end: tuple[int, int, int]
    skipped: int = 0


def nothing() -> dict[str, int]:
    """What the manifest counts, of the text up to its ``end``."""
    return {"tokens": 0, "documents": 0, "characters": 0, "skipped": 0}


class ShardWriter:
    """Fills one shard after another in ``folder``, and notes in the manifest how far it has come.

    A shard is a ``.part`` until it is full. The manifest says what of it is on disk for sure; whoever goes on cuts it
    there.

    Where ``val_tokens`` is None, the first shard is kept ``undivided`` to the end, when the number of tokens is known:
    then its first part, a tenth of all tokens, becomes the validation shard, and its rest trains.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], save_every: float):
        self.folder = folder
        self.manifest = manifest
        self.name = manifest["settings"]["name"]
        self.save_every = save_every
        self._file = None
        self._counts = {key: manifest[key] for key in nothing()}
        self._undivided = folder / f"{self.name}_000000.undivided"
        if manifest["complete"]:
            self._undivided.unlink(missing_ok=True)  # the last that is done
            return
        self._write_manifest()
        self.end = tuple(manifest["end"])
        self._open(self._next(), manifest["part"])
        self._remove_unnamed(self.path)
        self._save(self.end)

    def add(self, chunk: Chunk, tokens: list[np.ndarray]) -> None:
        """Write the ``tokens`` of each piece of ``chunk``."""
        shards = len(self.manifest["shards"])
        whole = np.concatenate([np.empty(0, dtype=np.uint16), *tokens])
        counts = len(whole), chunk.pieces.count(None), sum(len(piece) for piece in chunk.pieces if piece), chunk.skipped
        while (room := self._limit() - self.part) <= len(whole):
            self._write(whole[:room])
            whole = whole[room:]
            self._close()
            self._open(self._next())
        self._write(whole)
        for key, count in zip(nothing(), counts, strict=True):
            self._counts[key] += count
        if len(self.manifest["shards"]) > shards or time.monotonic() - self._saved >= self.save_every:
            self._save(chunk.end)

    def finish(self) -> None:
        """Close the last shard and declare the whole complete.

        Raises:
            ValueError: nothing to train on.
        """
        if self.part:
            self._close()
        else:
            self.close()
            self.path.unlink()
        settings, tokens, skipped = self.manifest["settings"], self._counts["tokens"], self._counts["skipped"]
        undivided = settings["val_tokens"] is None
        if tokens < 2 if undivided else len(self.manifest["shards"]) <= (settings["val_tokens"] > 0):
            self.discard()
            if tokens and not undivided:
                val = f"val_tokens={settings['val_tokens']}"
                raise ValueError(
                    f"{val} leaves nothing of the {tokens:,} tokens for training: val_tokens={tokens // 10}"
                )
            what = f"only {tokens:,} token" if tokens else "no document"
            nulls = f" ({skipped:,} null)" if skipped else ""
            raise ValueError(f"source holds {what}{nulls}: source=<files with more text>, or text_key=<another>")
        if undivided:
            self._divide(min(settings["shard_tokens"], max(tokens // 10, 1)))
        del self.manifest["part"], self.manifest["end"]
        self.manifest |= {"complete": True, **self._counts}
        self._write_manifest()
        self._undivided.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing behind, as if it had never begun."""
        self.close()
        self.manifest["shards"] = []
        self._remove_unnamed()
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _limit(self) -> int:
        settings = self.manifest["settings"]
        return settings["val_tokens"] if self._validates() else settings["shard_tokens"]

    def _validates(self) -> bool:
        return not self.manifest["shards"] and bool(self.manifest["settings"]["val_tokens"])

    def _next(self) -> str:
        """The name of the shard after those that are full."""
        number = len(self.manifest["shards"])
        if not number and self.manifest["settings"]["val_tokens"] is None:
            return self._undivided.name
        return f"{self.name}_{'val' if self._validates() else 'train'}_{number:06d}.bin"

    def _open(self, name: str, tokens: int = 0) -> None:
        """Begin a shard, or go on behind its first ``tokens``: it may have been full when that was noted nowhere."""
        self.shard = self.folder / name
        self.path = self.folder / f"{name}.part"
        self.part = tokens
        if self.shard.exists():
            self.shard.replace(self.path)
        known = HEADER + 2 * tokens
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        if self._file.seek(0, os.SEEK_END) < known and tokens:
            raise ValueError(f"output={self.folder} has lost a part of {self.path.name}: output=<a new folder>")
        self._file.truncate(known)
        self._file.seek(known)

    def _write(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype("<u2", copy=False).data)
        self.part += len(tokens)

    def _close(self) -> None:
        """The shard is full: give it its header and its name."""
        self._file.seek(0)
        self._file.write(header(self.part))
        self._flush()
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self.close()
        self.path.replace(self.shard)
        self.manifest["shards"].append({"file": self.shard.name, "tokens": self.part, "sha256": digest})

    def _divide(self, val_tokens: int) -> None:
        """Copy the first shard into one that validates and, unless that is all of it, one that trains.

        Until the manifest is written nothing has changed: after a kill the copies are made anew.
        """
        undivided, *others = self.manifest["shards"]
        self.manifest["shards"] = []
        tokens = np.memmap(self.folder / undivided["file"], dtype="<u2", mode="r", offset=HEADER)
        for role, part in ("val", tokens[:val_tokens]), ("train", tokens[val_tokens:]):
            if len(part):
                self._open(f"{self.name}_{role}_000000.bin")
                for first in range(0, len(part), BLOCK):
                    self._write(part[first : first + BLOCK])
                self._close()
        self.manifest["shards"] += others

    def _remove_unnamed(self, *needed: Path) -> None:
        """Remove the shards that the manifest does not name: what a killed process began after it last took notes."""
        kept = {self.folder / shard["file"] for shard in self.manifest["shards"]} | set(needed)
        ours = re.compile(re.escape(self.name) + r"_((val|train)_\d{6,}\.bin|000000\.undivided)(\.part)?")
        for file in list(self.folder.iterdir()):
            if ours.fullmatch(file.name) and file not in kept:
                file.unlink()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _save(self, end: tuple[int, int, int]) -> None:
        self._flush()
        self.manifest |= {"part": self.part, "end": list(end), **self._counts}
        self._write_manifest()
        self.end = end
        self._saved = time.monotonic()

    def _write_manifest(self) -> None:
        path = self.folder / MANIFEST
        part = path.with_name(f".{MANIFEST}.part")
        with part.open("w") as file:
            json.dump(self.manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
