"""What is in a text: its size and what it repeats."""

import itertools
from collections.abc import Hashable, Sequence
from operator import itemgetter

import numpy as np

from src.data.corpus import Corpus

LIMIT = 2**20  # hashes kept; a share estimated from half as many is off by 0.1 % (one standard deviation)
SMALL = 2**25  # characters of a training text; counting repetition takes less than a second
LINE = 2**20  # characters; what is longer counts as several lines


class Repetition:
    """The share of values that have occurred before, from hashes of 64 bits, ``(N,)`` uint64, in bounded memory.

    The share is exact up to ``limit`` different hashes. Beyond that only those below a bound are kept, which is halved
    when they become too many, and their number is scaled up (the k minimum values of Bar-Yossef et al. 2002).
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.total = 0
        self._known = np.empty(0, dtype=np.uint64)
        self._new: list[np.ndarray] = []
        self._waiting = 0
        self._halvings = 0

    def add(self, hashes: np.ndarray) -> None:
        self.total += len(hashes)
        if self._halvings:
            hashes = hashes[hashes < self._bound]
        self._new.append(hashes)
        self._waiting += len(hashes)
        if self._waiting >= self.limit:
            self._merge()

    @property
    def share(self) -> float:
        self._merge()
        return max(0.0, 1 - len(self._known) * 2**self._halvings / max(self.total, 1))

    @property
    def _bound(self) -> np.uint64:
        return np.uint64(2 ** (64 - self._halvings) - 1)

    def _merge(self) -> None:
        values = np.sort(np.concatenate([self._known, *self._new]))
        self._known = values[np.diff(values, prepend=~values[:1]) != 0]
        self._new, self._waiting = [], 0
        while len(self._known) > self.limit:
            self._halvings += 1
            self._known = self._known[: np.searchsorted(self._known, self._bound)]


class Facts:
    """Counts what :meth:`add` is given: consecutive pieces of text, with None where a document begins."""

    def __init__(self) -> None:
        self.characters = self.bytes = self.tokens = self.longest = self.skipped = 0
        self.documents, self.lines = Repetition(), Repetition()
        self._document, self._length, self._line = 0, -1, ""  # hash and length of the document, its unfinished line

    def add(self, pieces: list[str | None], tokens: int = 0, skipped: int = 0) -> None:
        self.tokens += tokens
        self.skipped += skipped
        documents, lines = [], []
        for piece in pieces:
            if piece is None:
                documents += self._end()
                lines.append(self._line)
                self._document, self._length, self._line = 0, 0, ""
                continue
            self.characters += len(piece)
            self.bytes += len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
            self._document = hash((self._document, piece))
            self._length += len(piece)
            lines += (self._line + piece).split("\n")
            self._line = lines.pop()
            if len(self._line) > LINE:
                lines.append(self._line)
                self._line = ""
        self.documents.add(_hashes(documents))
        hashes = _hashes(lines)
        self.lines.add(hashes[~np.isin(hashes, _hashes(["", "\r"]))])

    def _end(self) -> list[tuple[int, int]]:
        self.longest = max(self.longest, self._length)
        return [(self._document, self._length)] if self._length >= 0 else []

    def finish(self) -> "Facts":
        """To be called after the last piece."""
        self.add([None])
        self._length = -1
        return self

    def described(self) -> dict[str, str]:
        """The facts as short lines by what they are about."""
        skipped = f", {self.skipped:,} more without text" if self.skipped else ""
        return {
            "documents": f"{self.documents.total:,}, {self.documents.share:.1%} of them repeated, the longest of "
            f"{self.longest:,} characters{skipped}",
            "lines": f"{self.lines.total:,} not empty, {self.lines.share:.1%} of them repeated",
            "size": f"{self.characters:,} characters, {self.bytes:,} bytes, {self.tokens:,} tokens, "
            f"{self.bytes / max(self.tokens, 1):.2f} bytes per token",
        }


def _hashes(values: Sequence[Hashable]) -> np.ndarray:
    return np.fromiter(map(hash, values), np.int64, len(values)).view(np.uint64)


def facts_of(corpus: Corpus, tokens: int) -> dict[str, str]:
    """Short lines about the text of a training run, which has so many ``tokens``."""
    characters = sum(corpus.characters)
    if characters > SMALL:
        about = f"{len(corpus.files):,}, the longest of {max(corpus.characters):,} characters"
        size = f"{characters:,} characters, {tokens:,} tokens; repetition is counted up to {SMALL:,} characters"
        return {"documents": about, "size": size}
    facts = Facts()
    for _, pieces in itertools.groupby(corpus.pieces(0, characters), key=itemgetter(0)):
        facts.add([None, *(piece for _, piece in pieces)])
    facts.tokens = tokens
    return facts.finish().described()
