"""A tokenizer as the ``tokenizer.json`` of Hugging Face's ``tokenizers``: in runs, checkpoints, shards and exports."""

import functools
import itertools
import json
import re
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from src.tokenizer.encoding import END_OF_TEXT, UNKNOWN, characters_of, fingerprint, gpt2_tokenizer, token_ranks
from src.tokenizer.merges import all_merges, bytes_of, merges_of, spelled

FILE = "tokenizer.json"
PUBLISHED = {100261: "cl100k_base", 200000: "o200k_base"}  # by number of tokens, which is not all ids
EACH_CHARACTER = r"[\s\S]"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def make_encoding(ranks: dict[bytes, int], pattern: str, special: dict[str, int], name: str) -> tiktoken.Encoding:
    """The tokenizer with these tokens, the pattern that splits a text before they are merged, and a name that says its
    kind, its size and, by a hash, which one it is."""
    made = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    full = f"{name}-{made.n_vocab}-{fingerprint(made)[:8]}"
    return tiktoken.Encoding(full, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@functools.lru_cache
def to_json(tokenizer: tiktoken.Encoding) -> str | None:
    """The content of ``tokenizer.json`` for ``tokenizer``; None for GPT-2's, which is packaged."""
    if fingerprint(tokenizer) == fingerprint(gpt2_tokenizer()):
        return None
    return json.dumps(as_dictionary(tokenizer), ensure_ascii=False, separators=(",", ":"))


def as_dictionary(tokenizer: tiktoken.Encoding) -> dict[str, Any]:
    """``tokenizer`` in the format of ``tokenizers``, which then finds the same ids."""
    ranks = dict(sorted(token_ranks(tokenizer).items(), key=lambda item: item[1]))
    special = sorted((tokenizer.encode_single_token(token), token) for token in tokenizer.special_tokens_set)
    if characters_of(tokenizer) is None:
        model, around = _byte_level(ranks, tokenizer)
    else:
        each = {"type": "Split", "pattern": {"Regex": EACH_CHARACTER}, "behavior": "Isolated", "invert": False}
        model = {"type": "WordLevel", "vocab": {token.decode(): rank for token, rank in ranks.items()}}
        model |= {"unk_token": UNKNOWN}
        around = {"pre_tokenizer": each, "post_processor": None, "decoder": {"type": "Fuse"}}
    model["vocab"] |= {token: number for number, token in special}
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}
    added = [{"id": number, "content": token, **flags} for number, token in special]
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return {**head, **around, "model": model}


def _byte_level(ranks: dict[bytes, int], tokenizer: tiktoken.Encoding) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model, and what stands around it."""
    pattern = tokenizer._pat_str
    # tiktoken looks a piece of text up before it merges, and merges any two parts that make a token
    gpt2 = fingerprint(tokenizer) == fingerprint(gpt2_tokenizer())  # whose published merges are one pair per token
    merges = merges_of(ranks) if gpt2 else all_merges(ranks)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    sequence = {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        **({} if gpt2 else {"ignore_merges": True}),
        "vocab": {spelled(token): rank for token, rank in ranks.items()},
        "merges": [f"{spelled(left)} {spelled(right)}" for left, right in merges],
    }
    around = {"pre_tokenizer": BYTE_LEVEL if pattern == r50k_pat_str else sequence, "decoder": BYTE_LEVEL}
    return model, around | {"post_processor": {**BYTE_LEVEL, "trim_offsets": False}}


def from_json(text: str | bytes) -> tiktoken.Encoding:
    """The tokenizer that a ``tokenizer.json`` describes.

    Raises:
        ValueError: it is damaged, or neither byte-level BPE with GPT-2's kind of merges nor one token per character;
            the message begins with "its tokenizer.json".
    """
    try:
        content = json.loads(text)
        model, pre_tokenizer = content["model"], content["pre_tokenizer"] or {}
        special = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
        vocab = {token: int(number) for token, number in model["vocab"].items() if token not in special}
        if content["normalizer"] is not None:
            raise ValueError(f"its {FILE} normalizes texts, which this project does not")
        if END_OF_TEXT not in special:
            raise ValueError(f"its {FILE} has no {END_OF_TEXT} among its added tokens")
        if model["type"] == "WordLevel" and pre_tokenizer.get("pattern") == {"Regex": EACH_CHARACTER}:
            ranks = {token.encode(): number for token, number in vocab.items()}
            return make_encoding(ranks, EACH_CHARACTER, special, "char")
        pattern = _pattern_of(pre_tokenizer)
        if model["type"] != "BPE" or pattern is None:
            raise ValueError(f"its {FILE} is neither byte-level BPE nor one token per character")
        ranks = {bytes_of(token): number for token, number in vocab.items()}
        merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        _check_merges(ranks, [bytes_of("".join(merge)) for merge in merges])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {FILE} cannot be read ({type(error).__name__}: {str(error)[:100]})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its {FILE} is not JSON ({str(error)[:100]})") from None
    if ranks == token_ranks(gpt2_tokenizer()) and pattern == r50k_pat_str and special == {END_OF_TEXT: 50256}:
        return gpt2_tokenizer()
    kind = PUBLISHED.get(len(ranks) + len(special), "bpe") if "<|endofprompt|>" in special else "bpe"
    return make_encoding(ranks, pattern, special, kind if len(ranks) > 256 else "byte")


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern of a pre-tokenizer that splits by it and then maps bytes to characters."""
    if pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True):
        return None if pre_tokenizer.get("add_prefix_space") else r50k_pat_str
    if pre_tokenizer.get("type") == "Sequence":
        kinds = [part["type"] for part in pre_tokenizer["pretokenizers"]]
        if kinds == ["Split", "ByteLevel"]:
            return pre_tokenizer["pretokenizers"][0]["pattern"]["Regex"]
    return None


def portable(pattern: str) -> str:
    r"""A pattern of tiktoken's, to be read by the regex library of ``tokenizers`` too: possessive quantifiers, which
    find the same in these patterns, become greedy, and the end of the text is ``\z``, since ``$`` ends a line there."""
    greedy = re.sub(r"([+*?]|\{\d+,\d*\})\+", r"\1", pattern)
    return greedy.replace("$", r"\z")


def _check_merges(ranks: dict[bytes, int], merged: list[bytes]) -> None:
    numbers = [ranks[token] for token in merged]
    if any(later < earlier for earlier, later in itertools.pairwise(numbers)):
        raise ValueError(f"its {FILE} numbers its tokens in another order than it merges them")
    if {token for token in ranks if len(token) > 1} - set(merged):
        raise ValueError(f"its {FILE} has tokens that no merge makes")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"its {FILE} has no token for {len(missing)} of the 256 bytes")
