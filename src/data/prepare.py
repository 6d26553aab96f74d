"""Files of any size made into shards of tokens: read as a stream, tokenised on all cores, written in order."""

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from filelock import FileLock, Timeout

from src.data.config import PrepareConfig
from src.data.documents import Progress, find_sources, read_documents
from src.data.shards import HEADER, MANIFEST, header, read_manifest
from src.tokenizer import encode, fingerprint, gpt2_tokenizer, separable

CHUNK = 2**20  # characters that a worker tokenises at a time
SAVE_EVERY = 5.0  # seconds of work that a kill may cost
LOCK = ".lock"


class Chunk(NamedTuple):
    """Text to tokenise, ``None`` where a document begins, and the place behind it: number of the file, number of the
    record in it, characters of that record."""

    pieces: list[str | None]
    end: tuple[int, int, int]


def prepare_shards(
    config: PrepareConfig,
    tokenizer: tiktoken.Encoding | None = None,
    progress: Progress = lambda size: None,
    chunk: int = CHUNK,
    save_every: float = SAVE_EVERY,
) -> dict[str, Any]:
    """Make the shards that ``config`` asks for, or the rest of them, and return their manifest.

    What is written depends on the texts and on the settings that the manifest names alone: not on ``workers``, nor on
    ``chunk``, nor on how often the work was killed and taken up again. An end-of-text token stands before each
    document, and shards are full but for the last, as in llm.c. ``progress`` takes the bytes of the sources as they
    are read.

    The workers are threads: tiktoken lets go of Python's lock, and they need neither copies of texts nor of tokens.

    Raises:
        ValueError: sources that cannot be read; a folder that holds something else, or is in use; a full disk.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    files = find_sources(config.paths)
    folder = Path(config.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            shards = ShardWriter(folder, _manifest(config, files, folder, tokenizer), tokenizer, save_every)
            if shards.manifest["complete"]:
                return shards.manifest
            with closing(shards), ThreadPoolExecutor(config.workers or os.cpu_count()) as pool:
                chunks = _chunks(files, config.text_key, shards.end, chunk, progress)

                def tokenised(given: Chunk) -> list[np.ndarray]:
                    end_of_text = np.array([tokenizer.eot_token], dtype=np.uint16)
                    return [
                        end_of_text if piece is None else encode(piece, tokenizer, config.special_tokens)
                        for piece in given.pieces
                    ]

                for given, tokens in _in_order(pool, tokenised, chunks, 2 * (config.workers or os.cpu_count())):
                    shards.add(given, tokens)
                if _described(files) != shards.manifest["sources"]:
                    raise ValueError(f"source={config.paths[0]} changed while it was read: output=<a new folder>")
                shards.finish()
            return shards.manifest
    except Timeout:
        raise ValueError(f"output={folder} is in use by another process: stop that, or output=<a new folder>") from None
    except OSError as error:
        raise ValueError(
            f"output={folder} cannot be written to ({error.strerror}): free some space and run the same command again, "
            f"it goes on; or output=<a folder elsewhere>"
        ) from error


def _chunks(
    files: list[Path], text_key: str, begin: tuple[int, int, int], size: int, progress: Progress
) -> Iterator[Chunk]:
    """The documents of ``files`` from the place ``begin`` on, in chunks of about ``size`` characters."""
    pieces: list[str | None] = []
    held = 0
    for file in files[: begin[0]]:
        progress(file.stat().st_size)
    for number, file in enumerate(files[begin[0] :], begin[0]):
        first = begin[1] if number == begin[0] else 0
        for record, text in read_documents(file, text_key, first, progress):
            at = begin[2] if (number, record) == begin[:2] else 0
            if at == 0:
                pieces.append(None)
                held += 1
            for piece in separable(_from(text, at, size)):
                pieces.append(piece)
                at += len(piece)
                held += len(piece)
                if held >= size:
                    yield Chunk(pieces, (number, record, at))
                    pieces, held = [], 0
            if held >= size:  # documents without a character
                yield Chunk(pieces, (number, record + 1, 0))
                pieces, held = [], 0
    yield Chunk(pieces, (len(files), 0, 0))


def _from(pieces: Iterable[str], first: int, size: int) -> Iterator[str]:
    """The text from character ``first`` on, in pieces of at most ``size`` characters."""
    for piece in pieces:
        for start in range(first, len(piece), size):
            yield piece[start : start + size]
        first = max(first - len(piece), 0)


def _in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator[tuple]:
    """Pairs of item and result; at most ``ahead`` results wait, so that memory does not grow with the text."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                item, result = waiting.popleft()
                yield item, result.result()
        while waiting:
            item, result = waiting.popleft()
            yield item, result.result()
    finally:
        for _, result in waiting:
            result.cancel()


def _manifest(config: PrepareConfig, files: list[Path], folder: Path, tokenizer: tiktoken.Encoding) -> dict[str, Any]:
    """What ``folder`` is to hold, or already says that it holds."""
    settings = {
        "name": config.name or folder.resolve().name,
        "text_key": config.text_key,
        "shard_tokens": config.shard_tokens,
        "val_tokens": config.shard_tokens if config.val_tokens is None else config.val_tokens,
        "special_tokens": config.special_tokens,
    }
    asked = {"settings": settings, "tokenizer": fingerprint(tokenizer), "sources": _described(files)}
    found = read_manifest(folder)
    if found is None:
        if others := sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")):
            raise ValueError(f"output={folder} holds something else ({', '.join(others[:3])}): output=<a new folder>")
        return {"complete": False, **asked, "shards": [], "part": _nothing(), "end": [0, 0, 0]}
    if not found.keys() >= asked.keys():
        raise ValueError(f"output={folder} has a {MANIFEST} that cannot be read: output=<a new folder>")
    for key, value in settings.items():
        if found["settings"].get(key) != value:
            was = found["settings"].get(key)
            raise ValueError(f"{key}={value} is not what output={folder} was begun with: {key}={was}, or output=<new>")
    if found["tokenizer"] != asked["tokenizer"]:
        raise ValueError(f"output={folder} was begun with another tokenizer: output=<a new folder>")
    if found["sources"] != asked["sources"]:
        changed = [new["file"] for new in asked["sources"] if new not in found["sources"]]
        what = f"source: {changed[0]} is new or has changed" if changed else "source has fewer or other files"
        raise ValueError(f"{what} since output={folder} was begun: the same source=, or output=<a new folder>")
    for shard in found["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != HEADER + 2 * shard["tokens"]:
            raise ValueError(f"output={folder} has lost {path.name} or a part of it: output=<a new folder>")
    return found


def _described(files: list[Path]) -> list[dict[str, Any]]:
    stats = [(file, file.stat()) for file in files]
    return [{"file": str(file.absolute()), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for file, s in stats]


def _nothing() -> dict[str, int]:
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
        totals = {key: sum(shard[key] for shard in shards) for key in _nothing()}
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
        self.manifest["part"] = _nothing()

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
