"""Files of any size made into shards of tokens: read as a stream, tokenised on all cores, written in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from filelock import FileLock, Timeout

from src.data.config import PrepareConfig
from src.data.documents import Progress, find_sources, read_documents
from src.data.shard_writer import START, Chunk, ShardWriter, nothing
from src.data.shards import HEADER, MANIFEST, read_manifest
from src.tokenizer import encode, fingerprint, gpt2_tokenizer, separable

CHUNK = 2**20  # characters that a worker tokenises at a time
DOCUMENT = 100  # characters that take as much memory as a document does beside its text
SAVE_EVERY = 5.0  # seconds of work that a kill may cost
LOCK = ".lock"


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
    document, and shards are full but for the last, as in llm.c, and the first two where the validation shard is not.
    Documents whose text is null are skipped, and counted. ``progress`` takes the bytes of the sources as they are read.

    The workers are threads: tiktoken lets go of Python's lock, and they need neither copies of texts nor of tokens.

    Raises:
        ValueError: sources that cannot be read; a folder that holds something else, or is in use; a full disk.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    files, folder = find_sources(config.paths), Path(config.output).expanduser()
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            try:
                shards = ShardWriter(folder, _manifest(config, files, folder, tokenizer), save_every)
                if not shards.manifest["complete"]:
                    _fill(shards, config, files, tokenizer, progress, chunk)
            finally:
                with suppress(OSError):  # Windows removes it itself
                    (folder / LOCK).unlink()
        return shards.manifest
    except Timeout:
        raise ValueError(f"output={folder} is in use by another process: stop that, or output=<a new folder>") from None
    except OSError as error:
        raise ValueError(
            f"output={folder} cannot be written to ({error.strerror}): free some space and run the same command again, "
            f"it goes on; or output=<a folder elsewhere>"
        ) from error
    finally:
        with suppress(OSError):  # they hold something
            for place in new_folders:
                place.rmdir()


def _fill(
    shards: ShardWriter,
    config: PrepareConfig,
    files: list[Path],
    tokenizer: tiktoken.Encoding,
    progress: Progress,
    chunk: int,
) -> None:
    workers, end_of_text = config.workers or os.cpu_count(), np.array([tokenizer.eot_token], dtype=np.uint16)

    def tokenised(chunk: Chunk) -> list[np.ndarray]:
        return [
            end_of_text if piece is None else encode(piece, tokenizer, config.special_tokens) for piece in chunk.pieces
        ]

    try:
        with ThreadPoolExecutor(workers) as pool:
            chunks = _chunks(files, config.text_key, shards.end, chunk, progress)
            for given, tokens in _in_order(pool, tokenised, chunks, 2 * workers):
                shards.add(given, tokens)
        if _described(files) != shards.manifest["sources"]:
            raise ValueError(f"source={config.paths[0]} changed while it was read: output=<a new folder>")
        shards.finish()
    except Exception:
        if shards.end == START:  # there is nothing to go on with
            shards.discard()
        raise
    finally:
        shards.close()


def _chunks(
    files: list[Path], text_key: str, begin: tuple[int, int, int], size: int, progress: Progress
) -> Iterator[Chunk]:
    """The documents of ``files`` from the place ``begin`` on, in chunks of about ``size`` characters."""
    pieces: list[str | None] = []
    held = skipped = 0
    for file in files[: begin[0]]:
        progress(file.stat().st_size)
    for number, file in enumerate(files[begin[0] :], begin[0]):
        first = begin[1] if number == begin[0] else 0
        for record, text in read_documents(file, text_key, first, progress):
            at = begin[2] if (number, record) == begin[:2] else 0
            held += DOCUMENT
            if text is None:
                skipped += 1
            elif at == 0:
                pieces.append(None)
            for piece in separable(_from(text or [], at, size), f"source: {file}"):
                pieces.append(piece)
                at += len(piece)
                held += len(piece)
                if held >= size:
                    yield Chunk(pieces, (number, record, at), skipped)
                    pieces, held, skipped = [], 0, 0
            if held >= size:  # documents without a character
                yield Chunk(pieces, (number, record + 1, 0), skipped)
                pieces, held, skipped = [], 0, 0
    yield Chunk(pieces, (len(files), 0, 0), skipped)


def _from(pieces: Iterable[str], first: int, size: int) -> Iterator[str]:
    """The text from character ``first`` on, in pieces of at most ``size`` characters."""
    for piece in pieces:
        for start in range(first, len(piece), size):
            yield piece[start : start + size]
        first = max(first - len(piece), 0)


def _in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator[tuple]:
    """Pairs of item and result; at most ``ahead`` of them wait, so that memory does not grow with the text."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    finally:
        for _, result in waiting:
            result.cancel()


def _manifest(config: PrepareConfig, files: list[Path], folder: Path, tokenizer: tiktoken.Encoding) -> dict[str, Any]:
    """What ``folder`` is to hold, or already says that it holds."""
    settings = {
        "name": config.name or folder.resolve().name,
        "text_key": config.text_key,
        "shard_tokens": config.shard_tokens,
        "val_tokens": config.val_tokens,
        "special_tokens": config.special_tokens,
    }
    asked = {"settings": settings, "tokenizer": fingerprint(tokenizer), "sources": _described(files)}
    found = read_manifest(folder)
    if found is None:
        if others := sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")):
            raise ValueError(f"output={folder} holds something else ({', '.join(others[:3])}): output=<a new folder>")
        return {"complete": False, **asked, "shards": [], "part": 0, "end": list(START), **nothing()}
    if not found.keys() >= {*asked, *nothing()}:
        raise ValueError(f"output={folder} has a {MANIFEST} of another program or version: output=<a new folder>")
    for key, value in settings.items():
        if found["settings"].get(key) != value:
            was = found["settings"].get(key)
            asked_for, was = ("null" if given is None else given for given in (value, was))
            raise ValueError(
                f"{key}={asked_for} is not what output={folder} was begun with: {key}={was}, or output=<new>"
            )
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
