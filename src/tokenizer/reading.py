"""A tokenizer from the ``tokenizer.json`` of Hugging Face's ``tokenizers``, or from a table of tiktoken's."""

import base64
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from src.tokenizer.encoding import END_OF_TEXT, UNKNOWN, gpt2_tokenizer, token_ranks
from src.tokenizer.merges import bytes_of, merges_of
from src.tokenizer.table import EACH_CHARACTER, FILE, make_encoding

PUBLISHED = {100261: "cl100k_base", 200000: "o200k_base"}  # by number of tokens, which is not all ids
LARGEST = 2**26  # bytes of a file
MOST = 10_000_000  # tokens, as many as a model may have
SAMPLE = "".join(map(chr, range(128))) + " It's 1234 é\u0301 ß 一二。\r\n \u3000カ 😀 x=y/*z*/\t\n\n "


def from_file(path: Path) -> tiktoken.Encoding | None:
    """The tokenizer in ``path``, a ``tokenizer.json`` or a table of tiktoken's with GPT-2's pattern; None if there is
    no file.

    Raises:
        ValueError: it is neither, or cannot be read; the message begins with "its" and the file's name.
    """
    if not os.path.lexists(path):
        return None
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(f"its {path.name} is no file of at most {LARGEST >> 20} MiB")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"its {path.name} cannot be read ({error.strerror})") from None
    if path.suffix == ".json":
        return from_json(content)
    try:
        lines = [line.split() for line in content.splitlines() if line.strip()]
        pairs = [(base64.b64decode(token, validate=True), int(rank)) for token, rank in lines]
    except ValueError:
        raise ValueError(f"its {path.name} is not a table of base64 and numbers") from None
    ranks = dict(pairs)
    end = max(ranks.values(), default=0) + 1
    _check_tokens(path.name, [token for token, _ in pairs], [rank for _, rank in pairs])
    _check_bytes(path.name, ranks)
    return make_encoding(ranks, r50k_pat_str, {END_OF_TEXT: end}, "bpe")


def from_json(text: str | bytes) -> tiktoken.Encoding:
    """The tokenizer that a ``tokenizer.json`` describes.

    Raises:
        ValueError: it is damaged, or neither byte-level BPE with GPT-2's kind of merges nor one token per character;
            the message begins with "its tokenizer.json".
    """
    try:
        content = json.loads(text)
        model, pre_tokenizer, added = content["model"], content["pre_tokenizer"] or {}, content["added_tokens"]
        special = {token["content"]: token["id"] for token in added}
        vocab = {token: number for token, number in model["vocab"].items() if token not in special}
        if content["normalizer"] is not None:
            raise ValueError(f"its {FILE} normalizes texts, which this project does not")
        if END_OF_TEXT not in special:
            raise ValueError(f"its {FILE} has no {END_OF_TEXT} among its added tokens")
        if model.get("dropout") or any(
            token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word")
        ):
            raise ValueError(f"its {FILE} has dropout, or added tokens that take the space around them")
        names = [*vocab, *(token["content"] for token in added)]
        _check_tokens(FILE, names, [*vocab.values(), *(token["id"] for token in added)])
        if model["type"] == "WordLevel" and pre_tokenizer.get("pattern") == {"Regex": EACH_CHARACTER}:
            if UNKNOWN not in vocab or any(len(token) != 1 for token in vocab):
                raise ValueError(f"its {FILE} has tokens of several characters, or no U+FFFD")
            return make_encoding({token.encode(): n for token, n in vocab.items()}, EACH_CHARACTER, special, "char")
        pattern = _pattern_of(pre_tokenizer)
        if model["type"] != "BPE" or not pattern or not isinstance(pattern, str):
            raise ValueError(f"its {FILE} is neither byte-level BPE nor one token per character")
        ranks = {bytes_of(token): number for token, number in vocab.items()}
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        _check_bytes(FILE, ranks)
        _check_merges(ranks, [(bytes_of(left), bytes_of(right)) for left, right in merges])
    except json.JSONDecodeError as error:
        raise ValueError(f"its {FILE} is not JSON ({str(error)[:100]})") from None
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeError) as error:
        raise ValueError(f"its {FILE} cannot be read ({type(error).__name__}: {str(error)[:100]})") from None
    if ranks == token_ranks(gpt2_tokenizer()) and pattern == r50k_pat_str and special == {END_OF_TEXT: 50256}:
        return gpt2_tokenizer()
    kind = PUBLISHED.get(len(ranks) + len(special), "bpe") if "<|endofprompt|>" in special else "bpe"
    made = make_encoding(ranks, pattern, special, kind if len(ranks) > 256 else "byte")
    if b"".join(made.decode_tokens_bytes(made.encode_ordinary(SAMPLE))) != SAMPLE.encode():
        raise ValueError(f"its {FILE} has a pattern that leaves out parts of a text")
    return made


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern of a pre-tokenizer that splits by it and then maps bytes to characters; None for any other."""
    if pre_tokenizer.get("add_prefix_space"):
        return None
    if pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True):
        return r50k_pat_str
    if pre_tokenizer.get("type") == "Sequence":
        split, *others = pre_tokenizer["pretokenizers"]
        plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split.get("invert")
        if plain and [other["type"] for other in others] == ["ByteLevel"] and not others[0].get("add_prefix_space"):
            return split["pattern"]["Regex"]
    return None


def _check_tokens(file: str, tokens: Sequence[str | bytes], numbers: Sequence[Any]) -> None:
    if not all(type(number) is int and 0 <= number < MOST for number in numbers):
        raise ValueError(f"its {file} has a token whose number is not one below {MOST:,}")
    if not all(tokens) or len(set(tokens)) < len(tokens) or len(set(numbers)) < len(numbers):
        raise ValueError(f"its {file} has a token that is empty, or two with the same content or number")


def _check_bytes(file: str, ranks: dict[bytes, int]) -> None:
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"its {file} has no token for {len(missing)} of the 256 bytes")


def _check_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> None:
    numbers = [ranks[left + right] for left, right in merges]
    if any(later < earlier for earlier, later in itertools.pairwise(numbers)):
        raise ValueError(f"its {FILE} numbers its tokens in another order than it merges them")
    if set(merges_of(ranks)) - set(merges):
        raise ValueError(f"its {FILE} has tokens that its merges do not make")
