"""The merges of byte-level byte-pair encoding, and how Hugging Face's ``tokenizers`` spell bytes."""

import itertools
from collections.abc import Iterator


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, ...]]:
    """The pairs that byte-pair encoding learned, in order: the pair of a token is what remains of its bytes after all
    earlier merges."""
    return [
        tuple(_merged(token, ranks, rank))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
    ]


def _merged(token: bytes, ranks: dict[bytes, int], later_than: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, later_than) for left, right in itertools.pairwise(parts)]
        rank = min(pairs)
        at = pairs.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def all_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order of what they make."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for at in range(1, len(token)):
            if token[:at] in ranks and token[at:] in ranks:
                yield token[:at], token[at:]


def spelled(token: bytes) -> str:
    """``token`` in the characters that byte-level BPE writes for bytes."""
    return "".join(LETTERS[byte] for byte in token)


def bytes_of(token: str) -> bytes:
    return bytes(BYTES[letter] for letter in token)


def _letters() -> list[str]:
    """GPT-2's visible character for each byte: its own, or one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


LETTERS = _letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}
