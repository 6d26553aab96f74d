"""Shards on disk that are filled one after another, and can be gone on with after a kill."""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from src.data.shards import HEADER, MANIFEST, header


class Chunk(NamedTuple):
    """Text to tokenise, ``None`` where a document begins, and the place behind it: number of the file, number of the
    record in it, characters of that record."""

    pieces: list[str | None]
    end: tuple[int, int, int]


def nothing() -> dict[str, int]:
    return {"tokens": 0, "documents": 0, "characters": 0}


class ShardWriter:
    """Fills one shard after another in ``folder``, and notes in the manifest how far it has come.

    A shard is a ``.part`` until it is full. The manifest says what of it is on disk for sure; whoever goes on cuts it
    there. Documents and characters count where they begin.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tokenizer: tiktoken.Encoding, save_every: float):
        self.folder = folder
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.save_every = save_every
        self._file = None
        if manifest["complete"]:
            return
        self._write_manifest()
        self.end = tuple(manifest["end"])
        self._open()
        done = {shard["file"] for shard in manifest["shards"]}
        ours = re.compile(re.escape(manifest["settings"]["name"]) + r"_(val|train)_\d{6,}\.bin(\.part)?")
        for file in folder.iterdir():  # what a killed process had begun after it last took notes
            if ours.fullmatch(file.name) and file.name not in done and file != self.path:
                file.unlink()
        self._save(self.end)

    def add(self, chunk: Chunk, tokens: list[np.ndarray]) -> None:
        """Write the ``tokens`` of each piece of ``chunk``."""
        shards = len(self.manifest["shards"])
        whole = np.concatenate([np.empty(0, dtype=np.uint16), *tokens])
        if self._room() > len(whole):
            self._write(whole, chunk.pieces.count(None), sum(len(piece) for piece in chunk.pieces if piece))
        else:
            for piece, part in zip(chunk.pieces, tokens, strict=True):
                self._add_piece(piece, part)
        if len(self.manifest["shards"]) > shards or time.monotonic() - self._saved >= self.save_every:
            self._save(chunk.end)

    def finish(self) -> None:
        """Close the last shard and declare the whole complete."""
        if self.part["tokens"]:
            self._close()
        else:
            self.close()
            self.path.unlink()
        shards = self.manifest["shards"]
        val = self.manifest["settings"]["val_tokens"]
        if len(shards) <= (1 if val else 0):  # nothing that trains: as if it had never begun
            tokens = sum(shard["tokens"] for shard in shards)
            for file in [*(shard["file"] for shard in shards), MANIFEST]:
                (self.folder / file).unlink()
            if not tokens:
                raise ValueError("source holds no document: source=<files with text>")
            raise ValueError(
                f"val_tokens={val} leaves nothing of the {tokens:,} tokens for training: val_tokens={tokens // 10}"
            )
        del self.manifest["part"], self.manifest["end"]
        totals = {key: sum(shard[key] for shard in shards) for key in nothing()}
        self.manifest |= {"complete": True, **totals}
        self._write_manifest()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _limit(self) -> int:
        settings = self.manifest["settings"]
        return settings["val_tokens"] if self._validates() else settings["shard_tokens"]

    def _validates(self) -> bool:
        return not self.manifest["shards"] and self.manifest["settings"]["val_tokens"] > 0

    def _room(self) -> int:
        return self._limit() - self.part["tokens"]

    def _open(self) -> None:
        """Go on with the shard that is under way: none, a part, or one that was full when its notes were lost."""
        role, number = "val" if self._validates() else "train", len(self.manifest["shards"])
        self.shard = self.folder / f"{self.manifest['settings']['name']}_{role}_{number:06d}.bin"
        self.path = self.shard.with_name(f"{self.shard.name}.part")
        self.part = dict(self.manifest["part"])
        if self.shard.exists():
            self.shard.replace(self.path)
        known = HEADER + 2 * self.part["tokens"]
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        if self._file.seek(0, os.SEEK_END) < known and self.part["tokens"]:
            raise ValueError(f"output={self.folder} has lost a part of {self.path.name}: output=<a new folder>")
        self._file.truncate(known)
        self._file.seek(known)

    def _add_piece(self, piece: str | None, tokens: np.ndarray) -> None:
        documents, characters = (1, 0) if piece is None else (0, len(piece))
        while (room := self._room()) <= len(tokens):
            fitting = tokens[:room]
            there = characters if room == len(tokens) or piece is None else self._characters(fitting)
            self._write(fitting, documents, there)
            documents, characters, tokens = 0, characters - there, tokens[room:]
            self._close()
            self._open()
        self._write(tokens, documents, characters)

    def _characters(self, tokens: np.ndarray) -> int:
        """How many characters begin in ``tokens``: bytes of UTF-8 that do not continue one."""
        return sum(byte & 0xC0 != 0x80 for byte in self.tokenizer.decode_bytes(tokens.tolist()))

    def _write(self, tokens: np.ndarray, documents: int, characters: int) -> None:
        self._file.write(tokens.astype("<u2", copy=False).data)
        for key, more in zip(self.part, (len(tokens), documents, characters), strict=True):
            self.part[key] += more

    def _close(self) -> None:
        """The shard is full: give it its header and its name."""
        self._file.seek(0)
        self._file.write(header(self.part["tokens"]))
        self._flush()
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self.close()
        self.path.replace(self.shard)
        self.manifest["shards"].append({"file": self.shard.name, **self.part, "sha256": digest})
        self.manifest["part"] = nothing()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _save(self, end: tuple[int, int, int]) -> None:
        self._flush()
        self.manifest |= {"part": dict(self.part), "end": list(end)}
        self._write_manifest()
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
