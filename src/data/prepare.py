"""Files of any size made into shards of tokens: read as a stream, tokenised on all cores, written in order."""

import itertools
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import tiktoken
from filelock import Timeout

from src.data.config import PrepareConfig
from src.data.documents import find_sources, read_documents, size_of
from src.data.lock import locked
from src.data.pipeline import CHUNK, START, Chunk, tokenise
from src.data.progress import Progress
from src.data.remote import RemoteFile
from src.data.shard_writer import SAVE_EVERY, ShardWriter, new_manifest
from src.data.shards import HEADER, MANIFEST, read_manifest
from src.data.tokenizers import build_tokenizer
from src.tokenizer import encode, separable
from src.tokenizer.table import FILE, to_json

FETCHED = ".fetched"  # a folder beside the shards: the remote file under way, and the next one


def prepare_shards(
    config: PrepareConfig,
    tokenizer: tiktoken.Encoding | None = None,
    advance: Progress = lambda size: None,
    chunk: int = CHUNK,
    save_every: float = SAVE_EVERY,
) -> dict[str, Any]:
    """Make the shards that ``config`` asks for, or the rest of them, and return their manifest.

    What is written depends only on the texts and on the settings in the manifest. It does not depend on ``workers``, on
    ``chunk`` (characters that a worker tokenises at a time), or on how often the work was killed and resumed. An
    end-of-text token stands before each document, as in llm.c. All shards are full except the last, and the first two
    if the validation shard is not full. Documents whose text is null are skipped and counted. ``advance`` takes the
    bytes of the sources as they are read.

    Raises:
        ValueError: sources that cannot be read; a folder that holds something else, or is in use; a full disk.
    """
    tokenizer = tokenizer or build_tokenizer(config.tokenizer)
    if tokenizer.n_vocab > 2**16:
        raise ValueError(
            f"tokenizer={tokenizer.name} has {tokenizer.n_vocab:,} tokens, the 16 bits of a shard's tokens hold "
            f"{2**16:,}; use tokenizer=gpt2"
        )
    files, folder = find_sources(config.paths), Path(config.output).expanduser()
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            shards = ShardWriter(folder, _manifest(config, files, folder, tokenizer), save_every)
            if not shards.manifest["complete"]:
                chunks = _chunks(files, config.text_key, shards.end, chunk, advance, tokenizer, folder / FETCHED)
                tokenised = tokenise(chunks, tokenizer, config.special_tokens, config.workers, chunk)
                _fill(shards, tokenised, config, files, tokenizer)
        return shards.manifest
    except Timeout:
        raise ValueError(f"output={folder} is in use by another process; use output=<a new folder>") from None
    except OSError as error:
        raise ValueError(
            f"output={folder} cannot be written to ({error.strerror}); free some space and repeat the command, which "
            f"continues, or use output=<a folder elsewhere>"
        ) from error
    finally:
        if not (folder / MANIFEST).is_file() or (read_manifest(folder) or {}).get("complete"):
            shutil.rmtree(folder / FETCHED, ignore_errors=True)
        with suppress(OSError):  # stops at the first that is not empty
            for place in new_folders:
                place.rmdir()


def _fill(
    shards: ShardWriter,
    tokenised: Iterable,
    config: PrepareConfig,
    files: list[Path | RemoteFile],
    tokenizer: tiktoken.Encoding,
) -> None:
    try:
        written = 0
        for chunk, tokens in tokenised:
            room = None if config.max_tokens is None else config.max_tokens - shards.counts["tokens"]
            if end := _first_document_after(chunk, len(tokens), room, tokenizer, config.special_tokens):
                pieces, count = end
                skipped = tuple(before for before in chunk.skipped if before <= pieces)
                shards.add(Chunk(chunk.pieces[:pieces], (len(files), 0, 0), skipped), tokens[:count])
                break
            shards.add(chunk, tokens)
            for file in files[written : shards.end[0]]:
                if isinstance(file, RemoteFile):
                    file.place(shards.folder / FETCHED).unlink(missing_ok=True)
            written = shards.end[0]
        if _described(files) != shards.manifest["sources"]:
            raise ValueError(f"source={config.paths[0]} changed while it was read; use output=<a new folder>")
        if problem := _too_little(config.val_tokens, **shards.counts):
            shards.discard()
            raise ValueError(problem)
        if table := to_json(tokenizer):
            (shards.folder / FILE).write_text(table, encoding="utf-8")
        shards.finish()
    except Exception:
        if shards.end == START:  # there is nothing to continue from
            shards.discard()
        raise
    finally:
        shards.close()


def _first_document_after(
    chunk: Chunk, tokens: int, room: int | None, tokenizer: tiktoken.Encoding, special_tokens: str
) -> tuple[int, int] | None:
    """The number of the first piece of ``chunk``, of so many ``tokens``, that begins a document and has at least
    ``room`` tokens before it, and their number."""
    if room is None or tokens < room:
        return None
    lengths = [1 if piece is None else len(encode(piece, tokenizer, special_tokens)) for piece in chunk.pieces]
    before = [0, *itertools.accumulate(lengths)]
    starts = ((n, before[n]) for n, piece in enumerate(chunk.pieces) if piece is None and before[n] >= room)
    return next(starts, None)


def _too_little(val_tokens: int | None, tokens: int, skipped: int, **_: int) -> str | None:
    """Why so many ``tokens`` leave nothing to train on."""
    if tokens > (1 if val_tokens is None else val_tokens):
        return None
    if tokens and val_tokens:
        return (
            f"val_tokens={val_tokens} leaves nothing of the {tokens:,} tokens for training; "
            f"use val_tokens={tokens // 10}"
        )
    what = f"only {tokens:,} token" if tokens else "no document"
    nulls = f" ({skipped:,} null)" if skipped else ""
    return f"source holds {what}{nulls}; use source=<files with more text>, or text_key=<another>"


def _chunks(
    files: list[Path | RemoteFile],
    text_key: str,
    begin: tuple[int, int, int],
    size: int,
    advance: Progress,
    tokenizer: tiktoken.Encoding,
    fetched: Path,
) -> Iterator[Chunk]:
    """The documents of ``files`` from the place ``begin`` on, in chunks of less than about ``size`` characters. Remote
    files are fetched into the folder ``fetched``, one by one."""
    for file in files[: begin[0]]:
        advance(size_of(file) or 0)
    for number, found in enumerate(files[begin[0] :], begin[0]):
        file = found.fetch(fetched, "source") if isinstance(found, RemoteFile) else found
        first = begin[1] if number == begin[0] else 0
        for record, text in read_documents(file, text_key, first, advance):
            if text is None:
                yield Chunk([], (number, record + 1, 0), skipped=(0,))
                continue
            at = begin[2] if (number, record) == begin[:2] else 0
            end_of_text: list[str | None] = [] if at else [None]
            for piece in separable(_from(text, at, size), f"source: {file}", tokenizer):
                at += len(piece)
                yield Chunk([*end_of_text, piece], (number, record, at))
                end_of_text = []
            if end_of_text:  # a document without a character
                yield Chunk(end_of_text, (number, record + 1, 0))
    yield Chunk([], (len(files), 0, 0))


def _from(pieces: Iterable[str], first: int, size: int) -> Iterator[str]:
    """The text from character ``first`` on, in pieces of at most ``size`` characters."""
    for piece in pieces:
        for start in range(first, len(piece), size):
            yield piece[start : start + size]
        first = max(first - len(piece), 0)


def _manifest(
    config: PrepareConfig, files: list[Path | RemoteFile], folder: Path, tokenizer: tiktoken.Encoding
) -> dict[str, Any]:
    """The manifest of what ``folder`` is to hold: the one in it if there is one, else a new one."""
    keys = "text_key", "shard_tokens", "val_tokens", "max_tokens", "special_tokens"
    settings = {"name": config.name or folder.resolve().name, **{key: getattr(config, key) for key in keys}}
    new = new_manifest(settings, tokenizer, _described(files))
    found = read_manifest(folder)
    problem = _foreign_files(folder) if found is None else _difference(found, new, folder)
    if problem:
        raise ValueError(f"output={folder} {problem}; use output=<a new folder>")
    for key, value in settings.items():
        asked, begun = ("null" if v is None else v for v in (value, (found or new)["settings"].get(key)))
        if asked != begun:
            raise ValueError(
                f"{key}={asked} is not what output={folder} was begun with; use {key}={begun}, or output=<a new folder>"
            )
    return found or new


def _foreign_files(folder: Path) -> str | None:
    names = {file.name for file in folder.iterdir()} - {f"{MANIFEST}.part"}  # which a killed process leaves
    others = sorted(name for name in names if not name.startswith("."))
    return f"holds something else ({', '.join(others[:3])})" if others else None


def _difference(found: dict[str, Any], new: dict[str, Any], folder: Path) -> str | None:
    """Why the shards in ``folder``, of the manifest ``found``, are not the beginning of those of ``new``."""
    if not found.keys() >= new.keys() - {"part", "end"}:
        return f"has a {MANIFEST} of another program or version"
    if found["tokenizer"] != new["tokenizer"]:
        return "was begun with another tokenizer"
    if changed := [source["file"] for source in new["sources"] if source not in found["sources"]]:
        return f"was begun with other sources, {changed[0]} is new or has changed"
    if found["sources"] != new["sources"]:
        return "was begun with more sources or in another order"
    for shard in found["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != HEADER + 2 * shard["tokens"]:
            return f"has lost {path.name} or a part of it"
    return None


def _described(files: list[Path | RemoteFile]) -> list[dict[str, Any]]:
    return [file.described if isinstance(file, RemoteFile) else _described_locally(file) for file in files]


def _described_locally(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"file": str(file.absolute()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
