"""The files around ``tokenizer.json`` that Hugging Face's ``transformers`` reads."""

import json
from pathlib import Path

import tiktoken

from src.tokenizer.encoding import characters_of
from src.tokenizer.table import FILE, as_dictionary


def write_tokenizer(folder: Path, tokenizer: tiktoken.Encoding, context_length: int) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` to ``folder``, and for
    byte-level BPE ``vocab.json`` and ``merges.txt``."""
    content = as_dictionary(tokenizer)
    byte_level = characters_of(tokenizer) is None
    end_of_text = tokenizer.decode([tokenizer.eot_token])
    special = {"bos_token": end_of_text, "eos_token": end_of_text}
    special["unk_token"] = end_of_text if byte_level else content["model"]["unk_token"]
    files = {
        FILE: content,
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer" if tokenizer.name == "gpt2" else "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            **({"add_prefix_space": False} if byte_level else {"clean_up_tokenization_spaces": False}),
            **special,
        },
    }
    if byte_level:
        files["vocab.json"] = content["model"]["vocab"]
        (folder / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *content["model"]["merges"]]) + "\n", encoding="utf-8"
        )
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
