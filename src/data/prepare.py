"""Files of any size made into shards of tokens: read as a stream, tokenised on all cores, written in order."""

import itertools
import re
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
from src.data.manifest import MANIFEST, WHOLE, Part, join_parts, parts_in, read_manifest
from src.data.pipeline import CHUNK, START, Chunk, tokenise
from src.data.progress import Progress
from src.data.remote import RemoteFile
from src.data.shard_writer import SAVE_EVERY, ShardWriter, new_manifest
from src.data.shards import HEADER
from src.data.tokenizers import build_tokenizer
from src.tokenizer import encode, separable
from src.tokenizer.table import FILE, to_json

FETCHED = ".fetched"  # a folder beside the shards: the remote file under way, and the next one
PARTS = ".lock-parts"  # held while a part begins or ends


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

    With ``part=3/16`` the third of 16 parts of the files is made, which other processes need not wait for. The first
    part alone has a validation shard, and each ends at its share of ``max_tokens``. The last part to be complete writes
    the manifest of all.

    Raises:
        ValueError: sources that cannot be read; a folder that holds something else, or is in use; a full disk.
    """
    tokenizer = tokenizer or build_tokenizer(config.tokenizer)
    if tokenizer.n_vocab > 2**16:
        raise ValueError(
            f"tokenizer={tokenizer.name} has {tokenizer.n_vocab:,} tokens, the 16 bits of a shard's tokens hold "
            f"{2**16:,}; use tokenizer=gpt2"
        )
    sources, folder = find_sources(config.paths), Path(config.output).expanduser()
    part = Part.parse(config.part)
    files, fetched = part.of(sources), folder / f"{FETCHED}{part.suffix}"
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".lock{part.suffix}"):
            with locked(folder / PARTS, f"begins in {folder}"):
                manifest = _manifest(config, sources, folder, tokenizer)
                if part.count > 1 and not manifest["complete"]:
                    (folder / MANIFEST).unlink(missing_ok=True)
                shards = ShardWriter(folder, manifest, save_every, part=part)
            if not shards.manifest["complete"]:
                chunks = _chunks(files, config.text_key, shards.end, chunk, advance, tokenizer, fetched)
                tokenised = tokenise(chunks, tokenizer, config.special_tokens, config.workers, chunk)
                _fill(shards, tokenised, config, files, tokenizer, fetched)
            with locked(folder / PARTS, f"ends in {folder}"):
                join_parts(folder)
        return shards.manifest
    except Timeout:
        what = f"output={folder}" if part.count == 1 else f"part={part} of output={folder}"
        raise ValueError(f"{what} is in use by another process; use output=<a new folder>") from None
    except OSError as error:
        raise ValueError(
            f"output={folder} cannot be written to ({error.strerror}); free some space and repeat the command, which "
            f"continues, or use output=<a folder elsewhere>"
        ) from error
    finally:
        if not (folder / part.manifest).is_file() or (read_manifest(folder, part) or {}).get("complete"):
            shutil.rmtree(fetched, ignore_errors=True)
        with suppress(OSError):  # stops at the first that is not empty
            for place in new_folders:
                place.rmdir()


def _fill(
    shards: ShardWriter,
    tokenised: Iterable,
    config: PrepareConfig,
    files: list[Path | RemoteFile],
    tokenizer: tiktoken.Encoding,
    fetched: Path,
) -> None:
    most = None if config.max_tokens is None else -(-config.max_tokens // shards.which.count)
    try:
        written = 0
        for chunk, tokens in tokenised:
            room = None if most is None else most - shards.counts["tokens"]
            if end := _first_document_after(chunk, len(tokens), room, tokenizer, config.special_tokens):
                pieces, count = end
                skipped = tuple(before for before in chunk.skipped if before <= pieces)
                shards.add(Chunk(chunk.pieces[:pieces], (len(files), 0, 0), skipped), tokens[:count])
                break
            shards.add(chunk, tokens)
            for file in files[written : shards.end[0]]:
                if isinstance(file, RemoteFile):
                    file.place(fetched).unlink(missing_ok=True)
            written = shards.end[0]
        if _described(files) != shards.manifest["sources"]:
            raise ValueError(f"source={config.paths[0]} changed while it was read; use output=<a new folder>")
        may_be_empty = shards.which.count > 1 and shards.val_tokens == 0
        if not may_be_empty and (problem := _too_little(config.val_tokens, **shards.counts)):
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
    config: PrepareConfig, sources: list[Path | RemoteFile], folder: Path, tokenizer: tiktoken.Encoding
) -> dict[str, Any]:
    """The manifest of what ``folder`` is to hold: the one in it if there is one, else a new one."""
    part = Part.parse(config.part)
    keys = "text_key", "shard_tokens", "val_tokens", "max_tokens", "special_tokens"
    settings = {"name": config.name or folder.resolve().name, **{key: getattr(config, key) for key in keys}}
    settings["part"] = None if part.count == 1 else f"<number>/{part.count}"
    new = new_manifest(settings, tokenizer, _described(part.of(sources)))
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
        known, now = manifest["sources"], _described(one.of(sources))
        if one != part:  # whether the files of another part have changed is for that part to find out
            known, now = ([{"file": source["file"]} for source in described] for described in (known, now))
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


def _described(files: list[Path | RemoteFile]) -> list[dict[str, Any]]:
    return [file.described if isinstance(file, RemoteFile) else _described_locally(file) for file in files]


def _described_locally(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"file": str(file.absolute()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
