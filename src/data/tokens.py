"""A corpus as two arrays of token ids: in memory, or, if it is large, made once and kept on disk."""

import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

import numpy as np
import tiktoken
from filelock import FileLock, Timeout
from rich.progress import Progress, TransferSpeedColumn

from src.data.config import DataConfig
from src.data.corpus import Corpus, read_corpus
from src.data.download import CACHE_NAME
from src.data.shards import ShardTokens, read_shards
from src.tokenizer import encode_pieces, fingerprint

log = logging.getLogger(__name__)

LARGE = 2**25  # characters; below, tokenising takes seconds and is not kept


def read_split(
    config: DataConfig, tokenizer: tiktoken.Encoding, train_ratio: float
) -> tuple[np.ndarray | ShardTokens, np.ndarray | ShardTokens, str]:
    """Training and validation tokens of what ``config`` names, and a hash of it; a ``train_ratio`` of 1: all train.

    Raises:
        ValueError: text or shards that cannot be read; a cache that cannot be written to.
    """
    if config.format == "shards":
        return read_shards(config.path, train_ratio, tokenizer)
    corpus = read_corpus(config.path, config.url, config.sha256, config.mirrors, config.size)
    return *split_tokens(corpus, train_ratio, tokenizer, config.special_tokens, config.cache_dir), corpus.sha256


def split_tokens(
    corpus: Corpus,
    train_ratio: float,
    tokenizer: tiktoken.Encoding,
    special_tokens: str = "parse",
    cache_dir: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens of ``corpus``, each ``(N,)``, cut by characters before they are tokenised.

    Between each two documents stands one end-of-text token. Beyond ``LARGE`` characters both are memory-mapped from a
    file in ``cache_dir`` (None: the user's cache) that is a function of text, cut, tokenizer and ``special_tokens``.

    Raises:
        ValueError: the cache cannot be written to.
    """
    characters, cut = sum(corpus.characters), corpus.cut(train_ratio)
    ranges = (0, cut), (cut, characters)
    if characters <= LARGE:
        parts = [list(tokenise(corpus, *part, tokenizer, special_tokens)) for part in ranges]
        train, val = (np.concatenate(part) if part else np.empty(0, dtype=np.uint16) for part in parts)
        return train, val
    sources = [corpus.sha256, corpus.characters, cut, fingerprint(tokenizer), special_tokens]
    key = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    path = _cache(cache_dir) / f"{key[:32]}.tokens"
    kept = _read(path)
    if kept is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_remains(path.parent)
            with _claimed(path.stem, path.parent):
                kept = _read(path)  # made by another process meanwhile
                if kept is None:
                    _write(path, corpus, ranges, tokenizer, special_tokens)
                    kept = _read(path)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={path.parent} cannot be written to ({error.strerror}; it takes about "
                f"{characters / 2e9:.1f} GB): data.cache_dir=<a folder on another disk>"
            ) from error
    return kept


def tokenise(
    corpus: Corpus,
    first: int,
    last: int,
    tokenizer: tiktoken.Encoding,
    special_tokens: str = "parse",
    progress: Callable[[int], None] = lambda characters: None,
) -> Iterator[np.ndarray]:
    """Tokens of the characters ``first`` to ``last``, piece by piece, the same as of each document as a whole.

    Raises:
        ValueError: a document without a word boundary for millions of characters.
    """

    def texts(pieces: Iterator[tuple[int, str]]) -> Iterator[str]:
        for _, text in pieces:
            yield text
            progress(len(text))

    documents = itertools.groupby(corpus.pieces(first, last), key=itemgetter(0))
    tokens = None
    for number, pieces in documents:
        if tokens is not None:
            yield np.array([tokenizer.eot_token], dtype=tokens.dtype)
        source = f"data.path: {corpus.files[number]}"
        for tokens in encode_pieces(texts(pieces), tokenizer, special_tokens, source):
            yield tokens


def _cache(folder: str | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser()
    import pooch  # only a large text needs it

    return Path(pooch.os_cache(CACHE_NAME)) / "tokens"


@contextmanager
def _claimed(key: str, folder: Path, wait: bool = True) -> Iterator[None]:
    """While one process makes the tokens of ``key``, the others wait, those of other machines and containers too."""
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        log.info("waiting for another process that tokenises the same text into %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _remove_remains(folder: Path) -> None:
    """Remove the parts whose processes were killed: those that nobody claims."""
    for part in folder.glob("[0-9a-f]" * 32 + ".tokens*.part"):
        with suppress(OSError), _claimed(part.name[:32], folder, wait=False):
            part.unlink(missing_ok=True)


def _write(path: Path, corpus: Corpus, ranges, tokenizer: tiktoken.Encoding, special_tokens: str) -> None:
    part = path.with_name(f"{path.name}.part")
    digest, counts = hashlib.sha256(), []
    log.info("tokenising %s, %s characters, once, into %s", corpus.source, f"{sum(corpus.characters):,}", path)
    try:
        with part.open("wb") as file, _progress(corpus) as progress:
            for first, last in ranges:
                before = file.tell()
                for tokens in tokenise(corpus, first, last, tokenizer, special_tokens, progress):
                    file.write(tokens.data)
                    digest.update(tokens.data)
                counts.append((file.tell() - before) // tokens.itemsize)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        about = {"tokens": counts, "dtype": tokens.dtype.name, "sha256": digest.hexdigest(), "source": corpus.source}
        part.write_text(json.dumps(about))
        part.replace(path.with_suffix(".json"))
    finally:
        part.unlink(missing_ok=True)
    log.info("tokenised: %s tokens", f"{sum(counts):,}")


def _read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What is kept in ``path``; None where there is nothing, or something else than was written."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                log.warning("%s is damaged: tokenising again", path)
                return None
        train, val = about["tokens"]
        tokens = np.memmap(path, dtype=about["dtype"], mode="r")
    except (OSError, ValueError, KeyError):
        return None
    return tokens[:train], tokens[train : train + val]


@contextmanager
def _progress(corpus: Corpus) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; takes the number of characters that were read."""
    with Progress(*Progress.get_default_columns(), TransferSpeedColumn(), disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("tokenising", total=sum(corpus.characters))
        yield lambda characters: bar.advance(task, characters)
