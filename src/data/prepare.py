"""Files of any size made into shards of tokens: read as a stream, tokenized on all cores, written in order."""

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from filelock import Timeout

from src.data.config import PrepareConfig
from src.data.documents import find_sources, read_documents, size_of
from src.data.facts import Facts
from src.data.lock import locked
from src.data.manifest import MANIFEST, Part, join_parts, parts_in, read_manifest
from src.data.output_folder import described, manifest_for
from src.data.pipeline import CHUNK, START, Chunk, tokenize
from src.data.progress import Progress
from src.data.remote import RemoteFile
from src.data.shard_writer import SAVE_EVERY, ShardWriter
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
    ``chunk`` (characters that a worker tokenizes at a time), or on how often the work was killed and resumed. An
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
    sources, folder = find_sources(config.paths), config.folder
    part = Part.parse(config.part)
    files, fetched = part.of(sources), folder / f"{FETCHED}{part.suffix}"
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".lock{part.suffix}"):
            with locked(folder / PARTS, f"begins in {folder}"):
                manifest = manifest_for(config, sources, folder, tokenizer)
                if part.count > 1 and not manifest["complete"]:
                    (folder / MANIFEST).unlink(missing_ok=True)
                shards = ShardWriter(folder, manifest, save_every, part=part)
            if not shards.manifest["complete"]:
                _fill(shards, _Texts(config, tokenizer, files, fetched, advance, chunk))
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


def _fill(shards: ShardWriter, texts: "_Texts") -> None:
    config, most = texts.config, _share_of_max_tokens(texts.config)
    room = None if most is None else most - shards.counts["tokens"]
    try:
        written = 0
        for chunk, tokens in texts.tokenized(shards.end, room):
            shards.add(chunk, tokens)
            texts.remove(written, shards.end[0])
            written = shards.end[0]
        if described(texts.files) != shards.manifest["sources"]:
            raise ValueError(f"source={config.paths[0]} changed while it was read; use output=<a new folder>")
        may_be_empty = shards.which.count > 1 and shards.val_tokens == 0
        if not may_be_empty and (problem := _too_little(config.val_tokens, **shards.counts)):
            shards.discard()
            raise ValueError(problem)
        if table := to_json(texts.tokenizer):
            (shards.folder / FILE).write_text(table, encoding="utf-8")
        shards.finish()
    except Exception:
        if shards.end == START:  # there is nothing to continue from
            shards.discard()
            if not parts_in(shards.folder):
                (shards.folder / FILE).unlink(missing_ok=True)
        raise
    finally:
        shards.close()


def read_facts(config: PrepareConfig, advance: Progress = lambda size: None, chunk: int = CHUNK) -> Facts:
    """What is in the text of which :func:`prepare_shards` would make shards. Nothing is written, except for one remote
    file at a time in a temporary folder.

    Raises:
        ValueError: sources that cannot be read.
    """
    tokenizer, files = build_tokenizer(config.tokenizer), Part.parse(config.part).of(find_sources(config.paths))
    facts, read = Facts(), 0
    with tempfile.TemporaryDirectory() as folder:
        texts = _Texts(config, tokenizer, files, Path(folder), advance, chunk)
        for one, tokens in texts.tokenized(START, _share_of_max_tokens(config)):
            facts.add(one.pieces, len(tokens), len(one.skipped))
            texts.remove(read, one.end[0])
            read = one.end[0]
    return facts.finish()


def _share_of_max_tokens(config: PrepareConfig) -> int | None:
    return None if config.max_tokens is None else -(-config.max_tokens // Part.parse(config.part).count)


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


@dataclass(frozen=True)
class _Texts:
    """The documents in ``files``, read and tokenized as ``config`` says, in chunks of about ``size`` characters.
    ``advance`` takes the bytes that are read. Remote files are fetched into the folder ``fetched``, one by one."""

    config: PrepareConfig
    tokenizer: tiktoken.Encoding
    files: list[Path | RemoteFile]
    fetched: Path
    advance: Progress
    size: int

    def tokenized(self, begin: tuple[int, int, int], room: int | None) -> Iterator[tuple[Chunk, np.ndarray]]:
        """The chunks from the place ``begin`` on with their tokens, up to the document in which these reach ``room``;
        the end of the last chunk is that of all files."""
        special_tokens = self.config.special_tokens
        chunks = tokenize(self._chunks(begin), self.tokenizer, special_tokens, self.config.workers, self.size)
        for chunk, tokens in chunks:
            if end := self._first_document_after(chunk, len(tokens), room):
                pieces, count = end
                skipped = tuple(before for before in chunk.skipped if before <= pieces)
                yield Chunk(chunk.pieces[:pieces], (len(self.files), 0, 0), skipped), tokens[:count]
                return
            yield chunk, tokens
            room = None if room is None else room - len(tokens)

    def remove(self, first: int, last: int) -> None:
        """Remove those of the files ``first`` to ``last`` that were fetched."""
        for file in self.files[first:last]:
            if isinstance(file, RemoteFile):
                file.place(self.fetched).unlink(missing_ok=True)

    def _first_document_after(self, chunk: Chunk, tokens: int, room: int | None) -> tuple[int, int] | None:
        """The number of the first piece of ``chunk``, of so many ``tokens``, that begins a document and has at least
        ``room`` tokens before it, and their number."""
        if room is None or tokens < room:
            return None
        special_tokens = self.config.special_tokens
        lengths = [1 if piece is None else len(encode(piece, self.tokenizer, special_tokens)) for piece in chunk.pieces]
        before = [0, *itertools.accumulate(lengths)]
        starts = ((n, before[n]) for n, piece in enumerate(chunk.pieces) if piece is None and before[n] >= room)
        return next(starts, None)

    def _chunks(self, begin: tuple[int, int, int]) -> Iterator[Chunk]:
        """The documents from the place ``begin`` on, in chunks of less than about ``size`` characters."""
        for file in self.files[: begin[0]]:
            self.advance(size_of(file) or 0)
        for number, found in enumerate(self.files[begin[0] :], begin[0]):
            file = found.fetch(self.fetched, "source") if isinstance(found, RemoteFile) else found
            first = begin[1] if number == begin[0] else 0
            for record, text in read_documents(file, self.config.text_key, first, self.advance):
                if text is None:
                    yield Chunk([], (number, record + 1, 0), skipped=(0,))
                    continue
                at = begin[2] if (number, record) == begin[:2] else 0
                end_of_text: list[str | None] = [] if at else [None]
                for piece in separable(_from(text, at, self.size), f"source: {file}", self.tokenizer):
                    at += len(piece)
                    yield Chunk([*end_of_text, piece], (number, record, at))
                    end_of_text = []
                if end_of_text:  # a document without a character
                    yield Chunk(end_of_text, (number, record + 1, 0))
        yield Chunk([], (len(self.files), 0, 0))


def _from(pieces: Iterable[str], first: int, size: int) -> Iterator[str]:
    """The text from character ``first`` on, in pieces of at most ``size`` characters."""
    for piece in pieces:
        for start in range(first, len(piece), size):
            yield piece[start : start + size]
        first = max(first - len(piece), 0)
