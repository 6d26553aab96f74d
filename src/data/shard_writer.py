"""Shards on disk that are filled one after another. Writing resumes after a kill."""

import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from src.data.manifest import COUNTS, WHOLE, Part, write_manifest
from src.data.pipeline import START, Chunk
from src.data.shards import HEADER, header
from src.tokenizer import fingerprint

BLOCK = 2**20  # tokens copied at a time
SAVE_EVERY = 5.0  # seconds of work that a kill may cost


def new_manifest(settings: dict[str, Any], tokenizer: tiktoken.Encoding, sources: list[dict]) -> dict[str, Any]:
    """The manifest of shards of which nothing is written yet."""
    about = {"settings": settings, "tokenizer": fingerprint(tokenizer), "sources": sources}
    return {"complete": False, **about, "shards": [], "part": 0, "end": list(START), **COUNTS}


class ShardWriter:
    """Fills one shard after another in ``folder`` and records in the manifest how far it has come.

    A shard is a ``.part`` until it is full. The manifest counts the tokens of it that are surely on disk; a writer that
    resumes truncates it there.

    With a ``role`` (``train`` or ``val``), all shards have it. Without one, the first shard validates and has
    ``val_tokens`` tokens. If ``val_tokens`` is 0, there is no such shard. If it is None, the first shard is kept
    ``undivided`` until the number of tokens is known. Then a tenth of all tokens, from its beginning, becomes the
    validation shard, and its rest trains.

    Several writers may fill one folder, each with another ``part``. All shards train but those of the first part.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        save_every: float = SAVE_EVERY,
        role: str | None = None,
        part: Part = WHOLE,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.which = part
        self.role = role or ("train" if part.number > 1 else None)
        self.val_tokens = 0 if self.role else manifest["settings"]["val_tokens"]
        self.name = manifest["settings"]["name"] + part.suffix
        self.save_every = save_every
        self.counts = {key: manifest[key] for key in COUNTS}
        self._file: Any = None  # a file that is open for writing
        self._undivided = folder / f"{self.name}_000000.undivided"
        if manifest["complete"]:
            self._undivided.unlink(missing_ok=True)  # a writer was killed before its last act
            return
        self._write_manifest()
        self.end = tuple(manifest["end"])
        self._open(self._next(), manifest["part"])
        self._remove_unnamed(self.path)
        self._save(self.end)

    def add(self, chunk: Chunk, tokens: np.ndarray) -> None:
        """Write the ``tokens`` of ``chunk``."""
        shards = len(self.manifest["shards"])
        counts = len(tokens), chunk.pieces.count(None), chunk.characters, len(chunk.skipped)
        while (room := self._limit() - self.part) <= len(tokens):
            self._write(tokens[:room])
            tokens = tokens[room:]
            self._close()
            self._open(self._next())
        self._write(tokens)
        for key, count in zip(COUNTS, counts, strict=True):
            self.counts[key] += count
        if len(self.manifest["shards"]) > shards or time.monotonic() - self._saved >= self.save_every:
            self._save(chunk.end)

    def finish(self) -> None:
        """Close the last shard and declare all of them complete."""
        if self.part:
            self._close()
        else:
            self.close()
            self.path.unlink()
        if self.val_tokens is None:
            self._divide(min(self.manifest["settings"]["shard_tokens"], max(self.counts["tokens"] // 10, 1)))
        del self.manifest["part"], self.manifest["end"]
        self.manifest |= {"complete": True, **self.counts}
        self._write_manifest()
        self._undivided.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything that was written."""
        self.close()
        self.manifest["shards"] = []
        self._remove_unnamed()
        (self.folder / self.which.manifest).unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _limit(self) -> int:
        return self.val_tokens if self._is_first_of_two_roles() else self.manifest["settings"]["shard_tokens"]

    def _is_first_of_two_roles(self) -> bool:
        return not self.manifest["shards"] and bool(self.val_tokens)

    def _next(self) -> str:
        """The name of the shard after those that are full."""
        number = len(self.manifest["shards"])
        if not number and self.val_tokens is None:
            return self._undivided.name
        role = self.role or ("val" if self._is_first_of_two_roles() else "train")
        return f"{self.name}_{role}_{number:06d}.bin"

    def _open(self, name: str, tokens: int = 0) -> None:
        """Begin a shard, or continue it after its first ``tokens``. It may be full already without a record of it."""
        self.shard = self.folder / name
        self.path = self.folder / f"{name}.part"
        self.part = tokens
        if self.shard.exists():
            self.shard.replace(self.path)
        known = HEADER + 2 * tokens
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        if self._file.seek(0, os.SEEK_END) < known and tokens:
            raise ValueError(f"output={self.folder} has lost a part of {self.path.name}; use output=<a new folder>")
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

        Nothing has changed until the manifest is written: after a kill the copies are made again.
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
        """Remove shards that the manifest does not name, which a killed process began after its last save."""
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
        self.manifest |= {"part": self.part, "end": list(end), **self.counts}
        self._write_manifest()
        self.end = end
        self._saved = time.monotonic()

    def _write_manifest(self) -> None:
        write_manifest(self.folder, self.manifest, self.which)
