"""The tokens of a large text, kept as shards in a cache, so that they are made once."""

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from operator import itemgetter
from pathlib import Path

import numpy as np
import tiktoken

from src.data.corpus import Corpus
from src.data.download import user_cache
from src.data.lock import locked
from src.data.manifest import read_manifest
from src.data.pipeline import Chunk, tokenize
from src.data.progress import progress
from src.data.shard_writer import ShardWriter, new_manifest
from src.data.shards import ShardTokens
from src.files import expanded, sha256_of
from src.tokenizer import fingerprint, separable

log = logging.getLogger(__name__)

SHARD_TOKENS = 100_000_000


def cached_tokens(
    corpus: Corpus, cut: int, tokenizer: tiktoken.Encoding, special_tokens: str, cache_dir: str | None
) -> tuple[ShardTokens, ShardTokens]:
    """The tokens of the characters of ``corpus`` before and after ``cut``, as shards in ``cache_dir`` (None: the user's
    cache), in a folder whose name is a hash of the text, the cut, the tokenizer and ``special_tokens``. Processes that
    share the cache wait for the one that tokenizes.

    Raises:
        ValueError: the cache cannot be written to; a document without a word boundary for millions of characters.
    """
    characters = sum(corpus.characters)
    identity = [corpus.sha256, corpus.characters, cut, fingerprint(tokenizer), special_tokens]
    cache = expanded(cache_dir) if cache_dir is not None else user_cache() / "tokens"
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    if cached := _read(folder, tokenizer):
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_parts(cache)
        with locked(_lock(folder), f"tokenizes the same text into {folder}"):
            cached = _read(folder, tokenizer)  # another process may have written it in the meantime
            return cached or _write(folder, corpus, cut, tokenizer, special_tokens)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache} cannot be written to ({error.strerror}; it takes about "
            f"{characters / 2e9:.1f} GB); use data.cache_dir=<a folder on another disk>"
        ) from error


def tokenized(
    corpus: Corpus, first: int, last: int, tokenizer: tiktoken.Encoding, special_tokens: str
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """The characters ``first`` to ``last`` of ``corpus`` in chunks, with their tokens."""
    return tokenize(_chunks(corpus, first, last, tokenizer), tokenizer, special_tokens)


def _chunks(corpus: Corpus, first: int, last: int, tokenizer: tiktoken.Encoding) -> Iterator[Chunk]:
    """The documents between two characters, with an end-of-text token before each but the first."""
    separator: list[str | None] = []
    for number, pieces in itertools.groupby(corpus.pieces(first, last), key=itemgetter(0)):
        for piece in separable((text for _, text in pieces), f"data.path: {corpus.files[number]}", tokenizer):
            yield Chunk([*separator, piece])
            separator = []
        separator = [None]


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_parts(cache: Path) -> None:
    """Remove what processes that were killed left behind."""
    for part in cache.glob("[0-9a-f]" * 32 + ".part"):
        with suppress(OSError), locked(_lock(part.with_suffix(""))):
            shutil.rmtree(part, ignore_errors=True)


def _write(
    folder: Path, corpus: Corpus, cut: int, tokenizer: tiktoken.Encoding, special_tokens: str
) -> tuple[ShardTokens, ShardTokens]:
    """Make the shards in a folder of their own, which becomes ``folder`` once they are complete."""
    part, characters = folder.with_name(f"{folder.name}.part"), sum(corpus.characters)
    log.info("tokenizing %s, %s characters, once, into %s", corpus.source, f"{characters:,}", folder)
    settings = {"name": "text", "shard_tokens": SHARD_TOKENS, "val_tokens": 0, "special_tokens": special_tokens}
    try:
        with progress("tokenizing", characters, "characters") as advance:
            for role, first, last in ("train", 0, cut), ("val", cut, characters):
                (part / role).mkdir(parents=True)
                manifest = new_manifest(settings, tokenizer, [{"source": corpus.source, "sha256": corpus.sha256}])
                with closing(ShardWriter(part / role, manifest, role=role)) as shards:
                    for chunk, tokens in tokenized(corpus, first, last, tokenizer, special_tokens):
                        shards.add(chunk, tokens)
                        advance(chunk.characters)
                    shards.finish()
        shutil.rmtree(folder, ignore_errors=True)  # damaged, if it is there
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    written = _read(folder, tokenizer)
    assert written is not None
    return written


def _read(folder: Path, tokenizer: tiktoken.Encoding) -> tuple[ShardTokens, ShardTokens] | None:
    """The training and validation tokens in ``folder``; None if there are none or they are not what was written."""
    parts = []
    for role in "train", "val":
        manifest = read_manifest(folder / role)
        if not manifest:
            return None
        shards = {folder / role / shard["file"]: shard for shard in manifest["shards"]}
        for path, shard in shards.items():
            if not path.is_file() or sha256_of(path) != shard["sha256"]:
                log.warning("%s is damaged: tokenizing again", path)
                return None
        parts.append(ShardTokens([(path, shard["tokens"]) for path, shard in shards.items()], tokenizer.n_vocab))
    train, val = parts
    return train, val
