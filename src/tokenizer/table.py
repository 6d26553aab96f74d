"""A tokenizer as the ``tokenizer.json`` of Hugging Face's ``tokenizers``: in runs, checkpoints, shards and exports."""

import functools
import json
import re
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from src.tokenizer.encoding import UNKNOWN, characters_of, fingerprint, gpt2_tokenizer, token_ranks
from src.tokenizer.merges import all_merges, merges_of, spelled

FILE = "tokenizer.json"
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


def portable(pattern: str) -> str:
    r"""A pattern of tiktoken's, to be read by the regex library of ``tokenizers`` too: possessive quantifiers, which
    find the same in these patterns, become greedy, and the end of the text is ``\z``, since ``$`` ends a line there."""
    greedy = re.sub(r"([+*?]|\{\d+,\d*\})\+", r"\1", pattern)
    return greedy.replace("$", r"\z")
