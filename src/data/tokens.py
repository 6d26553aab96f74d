"""The training and validation tokens of a text or of shards. A large text becomes shards in a cache, once."""

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from src.data.config import DataConfig, TokenizerConfig
from src.data.corpus import Corpus, read_corpus
from src.data.download import user_cache
from src.data.files import find_files
from src.data.lock import locked
from src.data.pipeline import Chunk, tokenise
from src.data.progress import progress
from src.data.remote import shards_of
from src.data.shard_writer import ShardWriter, new_manifest
from src.data.shards import ShardTokens, read_manifest, read_shards, sha256_of
from src.data.tokenizers import build_tokenizer, describes
from src.tokenizer import fingerprint, gpt2_tokenizer, separable
from src.tokenizer.table import FILE

log = logging.getLogger(__name__)

LARGE = 2**25  # characters; fewer are tokenised in seconds and not cached
SHARD_TOKENS = 100_000_000

Tokens = np.ndarray | ShardTokens


class Split(NamedTuple):
    """Training and validation tokens, each ``(N,)``, a hash of the data, and the tokenizer they come from."""

    train: Tokens
    val: Tokens
    sha256: str
    tokenizer: tiktoken.Encoding


def read_split(config: DataConfig, tokenizer: tiktoken.Encoding | TokenizerConfig, train_ratio: float) -> Split:
    """The data that ``config`` names, split. With a ``train_ratio`` of 1, all tokens are for training. A tokenizer that
    is made from the training text does not see the rest of it.

    Raises:
        ValueError: text or shards that cannot be read; shards of another tokenizer; a cache that cannot be written to.
    """
    if config.format == "shards":
        files = shards_of(config)
        tokenizer = _tokenizer_of_shards(files, tokenizer, config.source)
        return Split(*read_shards(files, train_ratio, tokenizer), tokenizer)
    corpus = read_corpus(config.path, config.url, config.sha256, config.mirrors, config.size)
    if isinstance(tokenizer, TokenizerConfig):
        training = (text for _, text in corpus.pieces(0, corpus.cut(train_ratio)))
        tokenizer = build_tokenizer(tokenizer, training)
    train, val = split_tokens(corpus, train_ratio, tokenizer, config.special_tokens, config.cache_dir)
    return Split(train, val, corpus.sha256, tokenizer)


def _tokenizer_of_shards(
    files: str | list[Path], asked: tiktoken.Encoding | TokenizerConfig, source: str
) -> tiktoken.Encoding:
    """The tokenizer beside the shards ``files``, GPT-2's where there is none. By default no other is ``asked`` for.

    Raises:
        ValueError: another one is.
    """
    shards = find_files(files, "data.path", (".bin",)) if isinstance(files, str) else files
    tables = {shard.with_name(FILE) for shard in shards}
    found = [build_tokenizer(TokenizerConfig(name="file", path=str(table))) for table in tables if table.is_file()]
    own = found[0] if found else gpt2_tokenizer()
    if isinstance(asked, TokenizerConfig):
        same, name = asked == TokenizerConfig() or describes(asked, own), asked.name
    else:
        same, name = asked.name == own.name, asked.name
    if not same or any(one.name != own.name for one in found):
        raise ValueError(
            f"data.path={source} holds tokens of the tokenizer {own.name}, not of {name}; "
            f"use data.path=<shards of {name}>"
        )
    return own


def split_tokens(
    corpus: Corpus,
    train_ratio: float,
    tokenizer: tiktoken.Encoding,
    special_tokens: str = "parse",
    cache_dir: str | None = None,
) -> tuple[Tokens, Tokens]:
    """Training and validation tokens of ``corpus``, each ``(N,)``. The text is cut by characters before it is
    tokenised, and one end-of-text token stands between two documents.

    A text of more than ``LARGE`` characters becomes shards in ``cache_dir`` (None: the user's cache), in a folder whose
    name is a hash of the text, the cut, the tokenizer and ``special_tokens``. Processes that share the cache wait for
    the one that tokenises.

    Raises:
        ValueError: the cache cannot be written to; a document without a word boundary for millions of characters.
    """
    characters, cut = sum(corpus.characters), corpus.cut(train_ratio)
    if characters <= LARGE or tokenizer.n_vocab > 2**16:  # a shard has 16 bits per token
        ranges = (0, cut), (cut, characters)
        train, val = (tokens_between(corpus, *part, tokenizer, special_tokens) for part in ranges)
        return train, val
    identity = [corpus.sha256, corpus.characters, cut, fingerprint(tokenizer), special_tokens]
    cache = Path(cache_dir).expanduser() if cache_dir is not None else user_cache() / "tokens"
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    if cached := _read(folder, tokenizer):
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_parts(cache)
        with locked(_lock(folder), f"tokenises the same text into {folder}"):
            cached = _read(folder, tokenizer)  # another process may have written it in the meantime
            return cached or _write(folder, corpus, cut, tokenizer, special_tokens)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache} cannot be written to ({error.strerror}; it takes about "
            f"{characters / 2e9:.1f} GB); use data.cache_dir=<a folder on another disk>"
        ) from error


def tokens_between(
    corpus: Corpus, first: int, last: int, tokenizer: tiktoken.Encoding, special_tokens: str = "parse"
) -> np.ndarray:
    """The tokens ``(N,)`` of the characters ``first`` to ``last``, the same as those of each document as a whole."""
    parts = [tokens for _, tokens in tokenise(_chunks(corpus, first, last, tokenizer), tokenizer, special_tokens)]
    return np.concatenate([np.empty(0, dtype=np.uint16), *parts])


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
    log.info("tokenising %s, %s characters, once, into %s", corpus.source, f"{characters:,}", folder)
    settings = {"name": "text", "shard_tokens": SHARD_TOKENS, "val_tokens": 0, "special_tokens": special_tokens}
    try:
        with progress("tokenising", characters, "characters") as advance:
            for role, first, last in ("train", 0, cut), ("val", cut, characters):
                (part / role).mkdir(parents=True)
                manifest = new_manifest(settings, tokenizer, [{"source": corpus.source, "sha256": corpus.sha256}])
                with closing(ShardWriter(part / role, manifest, role=role)) as shards:
                    for chunk, tokens in tokenise(_chunks(corpus, first, last, tokenizer), tokenizer, special_tokens):
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
                log.warning("%s is damaged: tokenising again", path)
                return None
        parts.append(ShardTokens([(path, shard["tokens"]) for path, shard in shards.items()], tokenizer.n_vocab))
    train, val = parts
    return train, val
