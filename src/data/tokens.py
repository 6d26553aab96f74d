"""The training and validation tokens of a text or of shards. A large text becomes shards in a cache, once."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from src.data.config import DataConfig, TokenizerConfig
from src.data.corpus import Corpus, read_corpus
from src.data.files import find_files
from src.data.remote import shards_of
from src.data.shards import ShardTokens, read_shards
from src.data.token_cache import cached_tokens, tokenized
from src.data.tokenizers import build_tokenizer, describes
from src.tokenizer import gpt2_tokenizer
from src.tokenizer.reading import from_file
from src.tokenizer.table import FILE

LARGE = 2**25  # characters; fewer are tokenized in seconds and not cached

Tokens = np.ndarray | ShardTokens


class Split(NamedTuple):
    """Training and validation tokens, each ``(N,)``, a hash of the data, the tokenizer they come from, and the text if
    they do not come from shards."""

    train: Tokens
    val: Tokens
    sha256: str
    tokenizer: tiktoken.Encoding
    corpus: Corpus | None = None


def read_split(config: DataConfig, tokenizer: tiktoken.Encoding | TokenizerConfig, train_ratio: float) -> Split:
    """The data that ``config`` names, split. With a ``train_ratio`` of 1, all tokens are for training. A tokenizer that
    is made from the training text does not see the rest of it.

    Raises:
        ValueError: text or shards that cannot be read; shards of another tokenizer; a cache that cannot be written to.
    """
    if config.format == "shards":
        if config.path is None:  # ready-made ones, which are GPT-2's
            _tokenizer_of_shards([], tokenizer, config.source)
        files = shards_of(config)
        tokenizer = _tokenizer_of_shards(files, tokenizer, config.source)
        return Split(*read_shards(files, train_ratio, tokenizer), tokenizer)
    corpus = read_corpus(config.path, config.url, config.sha256, config.mirrors, config.size)
    if isinstance(tokenizer, TokenizerConfig):
        training = (text for _, text in corpus.pieces(0, corpus.cut(train_ratio)))
        tokenizer = build_tokenizer(tokenizer, training)
    train, val = split_tokens(corpus, train_ratio, tokenizer, config.special_tokens, config.cache_dir)
    return Split(train, val, corpus.sha256, tokenizer, corpus)


def _tokenizer_of_shards(
    files: str | list[Path], asked: tiktoken.Encoding | TokenizerConfig, source: str
) -> tiktoken.Encoding:
    """The tokenizer beside the shards ``files``, GPT-2's where there is none. By default no other is ``asked`` for.

    Raises:
        ValueError: another one is.
    """
    shards = find_files(files, "data.path", (".bin",)) if isinstance(files, str) else files
    found = {}
    for folder in dict.fromkeys(shard.parent for shard in shards):
        try:
            beside = from_file(folder / FILE) or gpt2_tokenizer()
        except ValueError as error:
            raise ValueError(f"data.path={folder}: {error}; use data.path=<shards made again>") from None
        found[beside.name] = beside
    own = next(iter(found.values()), gpt2_tokenizer())
    if len(found) > 1:
        raise ValueError(f"data.path={source} mixes tokens of {' and '.join(found)}; use data.path=<shards of one>")
    if isinstance(asked, TokenizerConfig):
        same, name = asked == TokenizerConfig() or describes(asked, own), asked.name
    else:
        same, name = asked.name == own.name, asked.name
    if not same:
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
    tokenized, and one end-of-text token stands between two documents.

    A text of more than ``LARGE`` characters becomes shards in ``cache_dir`` (None: the user's cache), unless the
    tokenizer has ids of more than 16 bits, which shards do not hold.

    Raises:
        ValueError: the cache cannot be written to; a document without a word boundary for millions of characters.
    """
    characters, cut = sum(corpus.characters), corpus.cut(train_ratio)
    if characters <= LARGE or tokenizer.n_vocab > 2**16:  # a shard has 16 bits per token
        ranges = (0, cut), (cut, characters)
        train, val = (tokens_between(corpus, *part, tokenizer, special_tokens) for part in ranges)
        return train, val
    return cached_tokens(corpus, cut, tokenizer, special_tokens, cache_dir)


def tokens_between(
    corpus: Corpus, first: int, last: int, tokenizer: tiktoken.Encoding, special_tokens: str = "parse"
) -> np.ndarray:
    """The tokens ``(N,)`` of the characters ``first`` to ``last``, the same as those of each document as a whole."""
    parts = [tokens for _, tokens in tokenized(corpus, first, last, tokenizer, special_tokens)]
    return np.concatenate([np.empty(0, dtype=np.uint16), *parts])
