"""Pieces of text to tokens, by gigatoken where it is installed and agrees with tiktoken."""

import base64
import functools
import logging
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from src.tokenizer import END_OF_TEXT, encode, token_dtype
from src.tokenizer.encoding import token_ranks

log = logging.getLogger(__name__)

PRETOKENIZERS = {r50k_pat_str: "gpt2"}  # the patterns that separable() may cut, and gigatoken's names for them
COMPARED = 32, 2**12  # pieces and characters of each; tiktoken takes about 10 ms for them
# The letters and numbers that Unicode 17 has added, in UTF-8: gigatoken knows them, tiktoken's regex does not. Three
# patterns that begin with one byte each are found fast, and cover some rare older characters.
NEWER = (
    re.compile(rb"\xe0(?:\xa2\x8f|[\xb1\xb3]\x9c)"),
    re.compile(rb"\xea\x9f"),
    re.compile(
        rb"\xf0(?:[\xb2\xb3]|\x90[\xa5\xbb]|\x91[\xb6\xb7]|\x96[\xba\xbb\xbf]|\x98[\x9f\xb4\xb6\xb7]|\x9e\x9b|\xab\x9c|\xac\xba)"
    ),
)
LIFE = 1.0  # seconds of work of a gigatoken tokenizer; another takes 0.06 to load and as long to fill its cache

Pieces = list[str | None]  # consecutive pieces of text as separable() cuts them; None is an end-of-text token
Encoder = Callable[[Pieces], np.ndarray]  # their tokens, (T,) of token_dtype; threads may share it


def encoder(tokenizer: tiktoken.Encoding, special_tokens: str, first: Pieces | None) -> Encoder:
    """An encoder that uses gigatoken if it gives the tokens of tiktoken for the beginning of the ``first`` pieces, else
    one that uses tiktoken; the log says which. For None, one that uses tiktoken."""
    plain = functools.partial(encode_pieces, tokenizer=tokenizer, special_tokens=special_tokens)
    if first is None:
        return plain
    pieces, characters = COMPARED
    sample = [part for piece in first[:pieces] if piece for part in (piece[:characters], None)]
    try:
        fast = FastEncoder(tokenizer, special_tokens)
        if not np.array_equal(fast(sample), plain(sample)):
            raise ValueError("gigatoken gives other tokens for this text")
    except ImportError:
        log.info('tokenizing with tiktoken; gigatoken is several times as fast, use pip install -e ".[fast]"')
    except ValueError as error:
        log.info("tokenizing with tiktoken (%s)", error)
    else:
        log.info("tokenizing with gigatoken")
        return fast
    return plain


def encode_pieces(pieces: Pieces, tokenizer: tiktoken.Encoding, special_tokens: str) -> np.ndarray:
    """The tokens of ``pieces`` by tiktoken. ``special_tokens`` is that of :func:`~src.tokenizer.encode`."""
    empty = np.empty(0, dtype=token_dtype(tokenizer))
    end_of_text = np.array([tokenizer.eot_token], dtype=empty.dtype)
    tokens = (end_of_text if piece is None else encode(piece, tokenizer, special_tokens) for piece in pieces)
    return np.concatenate([empty, *tokens])


class FastEncoder:
    """The same tokens by gigatoken, in one call that releases Python's lock.

    A tokenizer of gigatoken keeps what it has encoded in a cache without a limit: 0.3 MB per MB of source code, 9 MB
    per MB of random letters, for which it takes ten times as long. So it is replaced after ``LIFE`` seconds of work.

    Raises:
        ImportError: gigatoken is not installed.
        ValueError: it cannot read ``tokenizer``.
    """

    def __init__(self, tokenizer: tiktoken.Encoding, special_tokens: str) -> None:
        import gigatoken

        if tokenizer._pat_str not in PRETOKENIZERS or tokenizer.special_tokens_set != {END_OF_TEXT}:
            raise ValueError("gigatoken is used for GPT-2's pattern and special token only")
        self._gigatoken: Any = gigatoken
        self._plain = functools.partial(encode_pieces, tokenizer=tokenizer, special_tokens=special_tokens)
        self._parses = special_tokens == "parse"
        self._pretokenizer = PRETOKENIZERS[tokenizer._pat_str]
        self._end_of_text = {END_OF_TEXT: tokenizer.eot_token}
        self._dtype = token_dtype(tokenizer)
        ranks = sorted(token_ranks(tokenizer).items(), key=lambda item: item[1])
        self._table = b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for token, rank in ranks)
        self._idle = [(self._load(), 0.0)]

    def __call__(self, pieces: Pieces) -> np.ndarray:
        if not self._parses and any(END_OF_TEXT in piece for piece in pieces if piece):
            return self._plain(pieces)  # gigatoken always parses it
        text = b"".join(_utf8(END_OF_TEXT if piece is None else piece) for piece in pieces)
        if not text.isascii() and any(newer.search(text) for newer in NEWER):
            return self._plain(pieces)
        try:
            tokenizer, worked = self._idle.pop()  # each is locked while it encodes
        except IndexError:
            tokenizer, worked = self._load(), 0.0
        started = time.thread_time()
        rows, _ = tokenizer.encode_batch_padded(self._gigatoken.BytesSource(text), 0, parallel=False)  # (1, T)
        worked += time.thread_time() - started
        if worked < LIFE:
            self._idle.append((tokenizer, worked))
        return rows[0].astype(self._dtype)

    def _load(self) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ranks.tiktoken")
            path.write_bytes(self._table)
            try:
                return self._gigatoken.Tokenizer.from_tiktoken(path, self._pretokenizer, self._end_of_text)
            except RuntimeError as error:
                raise ValueError(f"gigatoken: {str(error).splitlines()[0]}") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which becomes U+FFFD
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
