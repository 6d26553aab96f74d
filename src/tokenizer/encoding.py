"""Text to token ids and back by a ``tiktoken.Encoding``. GPT-2's (Radford et al. 2019, section 2.2) is packaged."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from src.tokenizer.pieces import has_gpt2_pattern, split_white_space

if TYPE_CHECKING:
    from torch import Tensor

RANK_TABLE = Path(__file__).parents[1] / "assets" / "gpt2.tiktoken"
RANK_TABLE_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd"  # what a tokenizer of characters makes of a character that it does not have


@functools.cache
def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's 50,257 tokens; ``eot_token`` 50256 separates documents.

    Raises:
        ValueError: the packaged rank table is damaged.
    """
    table = RANK_TABLE.read_bytes()  # tiktoken's own loader leaves a copy in the temporary folder
    if hashlib.sha256(table).hexdigest() != RANK_TABLE_SHA256:
        raise ValueError(f"{RANK_TABLE} is damaged; restore it with git checkout {RANK_TABLE}")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, table.splitlines())}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def encode(text: str, tokenizer: tiktoken.Encoding | None = None, special_tokens: str = "parse") -> np.ndarray:
    """Token ids of ``text``, ``(T,)`` of :func:`token_dtype`.

    ``special_tokens`` decides what a special token that is written out becomes, such as ``<|endoftext|>``, in a corpus
    and in a prompt alike: ``parse`` makes it that token, ``text`` encodes it like any other text. A character that a
    tokenizer of characters does not have becomes U+FFFD.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    allowed = tokenizer.special_tokens_set if special_tokens == "parse" else set()
    if unknown := _unknown(tokenizer):
        text = unknown[bool(allowed)].sub(lambda found: found[1] or UNKNOWN, text)

    def ids(text: str) -> np.ndarray:
        try:
            return tokenizer.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which becomes U+FFFD
            return ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # the stack of tiktoken's regex overflowed
            parts = split_white_space(text, allowed) if has_gpt2_pattern(tokenizer) else [text]
            if len(parts) == 1:
                raise
            return np.concatenate([ids(part) for part in parts])

    return ids(text).astype(token_dtype(tokenizer))


def characters_of(tokenizer: tiktoken.Encoding) -> set[str] | None:
    """The characters that are the tokens of ``tokenizer``; None where all bytes are tokens: it takes any text."""
    tokens = set(tokenizer.token_byte_values())
    return None if all(bytes([byte]) in tokens for byte in range(256)) else {token.decode() for token in tokens}


def unknown_characters(text: str, tokenizer: tiktoken.Encoding, special_tokens: str = "parse") -> str:
    """The characters of ``text`` that a tokenizer of characters does not have, sorted. See :func:`encode`."""
    unknown = _unknown(tokenizer)
    found = unknown[special_tokens == "parse"].finditer(text) if unknown else ()
    return "".join(sorted({match[0] for match in found if not match[1]}))


def unknown_tokens(tokens: Any, tokenizer: tiktoken.Encoding) -> int:
    """How many of ``tokens``, an array or shards, stand for characters that a tokenizer of characters does not have.
    With any other tokenizer they are not read."""
    if characters_of(tokenizer) is None:
        return 0
    return int(np.count_nonzero(tokens[:] == tokenizer.encode_single_token(UNKNOWN)))


@functools.lru_cache
def _unknown(tokenizer: tiktoken.Encoding) -> tuple[re.Pattern, re.Pattern] | None:
    """What finds the characters that a tokenizer of characters does not have, and with them, second, special tokens,
    which are its first group; None for a tokenizer that takes any text."""
    known = characters_of(tokenizer)
    if known is None:
        return None
    others, special = f"[^{''.join(map(re.escape, sorted(known)))}]", map(re.escape, tokenizer.special_tokens_set)
    return re.compile(f"(?!)()|{others}"), re.compile(f"({'|'.join(special)})|{others}")


def token_dtype(tokenizer: tiktoken.Encoding) -> type[np.unsignedinteger]:
    """uint16 if it holds all ids of ``tokenizer``, else uint32."""
    return np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32


@functools.lru_cache
def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """A hash of everything that decides how ``tokenizer`` encodes: its pattern, its tokens and its special tokens."""
    special = {token: tokenizer.encode_single_token(token) for token in tokenizer.special_tokens_set}
    parts = [tokenizer._pat_str, sorted(token_ranks(tokenizer).items()), sorted(special.items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def token_ranks(tokenizer: tiktoken.Encoding) -> dict[bytes, int]:
    """The id of each token but the special ones, which is also its rank in the order of merges."""
    return {token: tokenizer.encode_single_token(token) for token in tokenizer.token_byte_values()}


def text_to_token_ids(text: str, tokenizer: tiktoken.Encoding | None = None, special_tokens: str = "parse") -> Tensor:
    """Token ids of ``text`` as a batch of one, ``(1, T)`` int64. See :func:`encode`."""
    import torch  # not needed to prepare data

    return torch.from_numpy(encode(text, tokenizer, special_tokens).astype(np.int64)).unsqueeze(0)


def token_ids_to_text(token_ids: Tensor, tokenizer: tiktoken.Encoding | None = None) -> str:
    """The text of ``token_ids``, ``(1, T)`` or ``(T,)``.

    Bytes that are not UTF-8 and ids that the tokenizer does not have (as in a padded vocabulary) become U+FFFD.

    Raises:
        ValueError: a batch of several rows.
    """
    if token_ids.dim() > 1 and token_ids.shape[0] != 1:
        raise ValueError(f"token_ids_to_text takes one row, not {token_ids.shape[0]}; decode row by row")
    return b"".join(token_bytes(token, tokenizer) for token in token_ids.flatten().tolist()).decode(errors="replace")


def token_bytes(token: int, tokenizer: tiktoken.Encoding | None = None) -> bytes:
    """The bytes of one token, or those of U+FFFD if the tokenizer does not have it."""
    try:
        return (tokenizer or gpt2_tokenizer()).decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def token_byte_counts(tokenizer: tiktoken.Encoding | None = None) -> np.ndarray:
    """The number of bytes of text in each token, ``(n_vocab,)``; 0 for special tokens."""
    tokenizer = tokenizer or gpt2_tokenizer()

    def count(token: int) -> int:
        return 0 if tokenizer.is_special_token(token) else len(token_bytes(token, tokenizer))

    return np.array([count(token) for token in range(tokenizer.n_vocab)], dtype=np.int64)
