"""Chunks of text to tokens, on all cores and in order."""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tiktoken

from src.data.fast_encoding import Pieces, encoder

CHUNK = 2**20  # characters that a worker tokenizes at a time
DOCUMENT = 100  # characters that take as much memory as the overhead of a short piece
START = (0, 0, 0)


class Chunk(NamedTuple):
    """Pieces of text to tokenize, with None for an end-of-text token, and the place in the source where they end:
    number of the file, number of the record in it, characters of that record. ``skipped`` has the number of pieces
    before each record without text."""

    pieces: Pieces
    end: tuple[int, int, int] = START
    skipped: tuple[int, ...] = ()

    @property
    def characters(self) -> int:
        return sum(map(len, filter(None, self.pieces)))


def tokenize(
    chunks: Iterable[Chunk],
    tokenizer: tiktoken.Encoding,
    special_tokens: str = "parse",
    workers: int | None = None,
    size: int = CHUNK,
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Chunks of at least ``size`` characters, made of the consecutive ``chunks``, each with its tokens ``(T,)``.

    ``workers`` threads (None: one per core) tokenize at most two chunks each ahead of the reader, so memory does not
    grow with the text. Threads suffice: tiktoken and gigatoken release Python's lock, and neither texts nor tokens are
    copied. A text of one chunk is not worth the time to load gigatoken.
    """
    chunks = merged(chunks, size)
    begin = list(itertools.islice(chunks, 2))
    encoded = encoder(tokenizer, special_tokens, begin[0].pieces if len(begin) == 2 else None)
    workers = workers or os.cpu_count() or 1
    waiting: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in itertools.chain(begin, chunks):
                waiting.append((chunk, pool.submit(encoded, chunk.pieces)))
                if len(waiting) > 2 * workers:
                    first, tokens = waiting.popleft()
                    yield first, tokens.result()
            while waiting:
                first, tokens = waiting.popleft()
                yield first, tokens.result()
        finally:
            for _, tokens in waiting:
                tokens.cancel()


def merged(chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """Consecutive ``chunks`` joined until they have at least ``size`` characters."""
    pieces: Pieces = []
    skipped: list[int] = []
    characters = 0
    for chunk in chunks:
        skipped += [len(pieces) + before for before in chunk.skipped]
        pieces += chunk.pieces
        characters += DOCUMENT + chunk.characters
        if characters >= size:
            yield Chunk(pieces, chunk.end, tuple(skipped))
            pieces, characters, skipped = [], 0, []
    if characters:
        yield Chunk(pieces, chunk.end, tuple(skipped))
