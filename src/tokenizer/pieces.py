"""Where a text can be cut so that its pieces have the tokens of the whole."""

import itertools
import re
from collections.abc import Iterable, Iterator

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space, fewer than Python's
BREAK = re.compile(f"(?<=[^{WHITE}])[{WHITE}]")
OTHER_BREAK = re.compile(f"(?<=[^{WHITE}])(?![\\r\\n])[{WHITE}]|(?<=[\\r\\n])[^{WHITE}/]")
LONG = 2**16  # white space in a row that is split for tiktoken's regex, whose stack overflows at about a million
LONGEST = 5_000_000  # characters without a break that are held in memory; tokenizing them takes 50 to 130 bytes each


def has_gpt2_pattern(tokenizer: tiktoken.Encoding) -> bool:
    """Whether ``tokenizer`` splits a text as GPT-2's does, before it merges bytes."""
    return tokenizer._pat_str == r50k_pat_str


def split_white_space(text: str, special_tokens: set[str], long: int = LONG) -> list[str]:
    r"""``text`` cut in each run of at least ``long`` white space. The parts have the same tokens as the whole.

    If text follows, GPT-2's pattern ends such a run one character early, by ``\s+(?!\S)``, for which tiktoken's regex
    keeps an entry per character on its stack. At the end of a text, and before one of ``special_tokens``, it takes the
    whole run, by ``\s++$``, without a stack. So a part that ends where the run would have ended has the same tokens.
    """
    cuts = [0]
    for run in re.finditer(f"[{WHITE}]+", text):
        ends_early = run.end() < len(text) and not any(text.startswith(token, run.end()) for token in special_tokens)
        if len(run[0]) >= long and ends_early:
            cuts.append(run.end() - 1)
    return [text[first:last] for first, last in itertools.pairwise([*cuts, len(text)])]


def separable(pieces: Iterable[str], source: str = "text", tokenizer: tiktoken.Encoding | None = None) -> Iterator[str]:
    """The text in ``pieces``, cut where white space begins. GPT-2's pattern always starts a new match there, so the new
    pieces can be encoded separately and have the tokens of the whole. The patterns of cl100k_base and o200k_base match
    a line break, and what of "/" follows, together with what stands before it; those texts are cut after it.

    Raises:
        ValueError: more than ``LONGEST`` characters without such a place. The message begins with ``source``, which is
            ``<key>: <file>``.
    """
    rest, searched = "", 1
    pattern = BREAK if tokenizer is None or has_gpt2_pattern(tokenizer) else OTHER_BREAK
    for piece in pieces:
        if cut := _last_break(rest, searched, pattern):
            yield rest[:cut]
            rest = rest[cut:]
        searched = max(len(rest), 1)
        rest += piece
        if len(rest) > LONGEST and not pattern.search(rest, searched, LONGEST + 1):
            raise ValueError(
                f"{source} has more than {LONGEST:,} characters without a word boundary; "
                f"use {source.partition(':')[0]}=<the file with line breaks>"
            )
    if rest:
        yield rest


def _last_break(text: str, searched: int, pattern: re.Pattern) -> int:
    for first in max(len(text) - 1000, searched), searched:
        if found := [match.start() for match in pattern.finditer(text, first)]:
            return found[-1]
    return 0
