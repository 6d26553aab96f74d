"""GPT-2's tokenizer as the files that Hugging Face's tokenizers read, derived from the rank table."""

import itertools
import json
from pathlib import Path

import tiktoken


def write_tokenizer(folder: Path, tokenizer: tiktoken.Encoding, context_length: int) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``, ``vocab.json``, ``merges.txt``
    to ``folder``."""
    ranks = tokenizer._mergeable_ranks
    end_of_text = tokenizer.decode([tokenizer.eot_token])
    vocab = {_spelled(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    merges = [f"{_spelled(left)} {_spelled(right)}" for left, right in merges_of(ranks)]
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab[end_of_text] = tokenizer.eot_token
    files = {
        "vocab.json": vocab,
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": context_length,
            "add_prefix_space": False,
            **special,
        },
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": tokenizer.eot_token,
                    "content": end_of_text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": {**byte_level, "trim_offsets": False},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "vocab": vocab,
                "merges": merges,
            },
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


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


def _spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _letters() -> list[str]:
    """GPT-2's visible character for each byte: its own, or one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


LETTERS = _letters()
