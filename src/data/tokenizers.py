"""Which tokenizer: a published one, one made from the training text, or one from a file."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from src.data.config import TokenizerConfig
from src.files import expanded
from src.tokenizer.encoding import END_OF_TEXT, UNKNOWN, gpt2_tokenizer
from src.tokenizer.reading import from_file, from_json
from src.tokenizer.table import EACH_CHARACTER, FILE, make_encoding, portable

TRAINED_ON = 10**8  # characters at most that BPE is trained on: more take minutes and change few merges


def build_tokenizer(config: TokenizerConfig, text: Iterable[str] | None = None) -> tiktoken.Encoding:
    """The tokenizer that ``config`` names; ``text`` is the training text in pieces.

    Raises:
        ValueError: a file that is no tokenizer; a download that failed; a text too short for so many tokens.
    """
    if config.name == "gpt2":
        return gpt2_tokenizer()
    if config.name == "byte":
        return _with_end({bytes([byte]): byte for byte in range(256)}, r50k_pat_str, "byte")
    if config.name == "file":
        return _read(expanded(config.path or ""))
    if config.name in ("cl100k_base", "o200k_base"):
        return _published(config.name)
    assert text is not None, "made from a text"
    if config.name == "char":
        found = sorted({UNKNOWN}.union(*map(set, text)))
        return _with_end({character.encode(): number for number, character in enumerate(found)}, EACH_CHARACTER, "char")
    assert config.vocab_size is not None
    return _trained(text, config.vocab_size)


def _with_end(ranks: dict[bytes, int], pattern: str, name: str) -> tiktoken.Encoding:
    return make_encoding(ranks, pattern, {END_OF_TEXT: max(ranks.values()) + 1}, name)


def _trained(text: Iterable[str], size: int) -> tiktoken.Encoding:
    """Byte-pair encoding with GPT-2's pattern (Sennrich et al. 2016; Radford et al. 2019, section 2.2)."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False)  # pyright: ignore
    learner.train_from_iterator(_beginning(text), trainer)
    content = json.loads(learner.to_str())
    made = len(content["model"]["vocab"]) + 1
    if made < size:
        raise ValueError(
            f"tokenizer.vocab_size={size} is more than the {made} tokens that this text yields; "
            f"use tokenizer.vocab_size={made}"
        )
    content |= {"normalizer": None, "added_tokens": [{"content": END_OF_TEXT, "id": size - 1}]}
    return from_json(json.dumps(content))


def _beginning(text: Iterable[str]) -> Iterator[str]:
    left = TRAINED_ON
    for piece in text:
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _published(name: str) -> tiktoken.Encoding:
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # of requests, which only a download imports, or a wrong hash
        raise ValueError(
            f"tokenizer={name} could not be fetched ({type(error).__name__}); use tokenizer=gpt2, or "
            f"tokenizer=file tokenizer.path=<a copy>"
        ) from None
    special = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    return make_encoding(ranks, portable(encoding._pat_str), special, name)


def _read(path: Path) -> tiktoken.Encoding:
    try:
        found = from_file(path)
        if found is None:
            raise ValueError(f"it does not exist (seen from {Path.cwd()})")
        return found
    except ValueError as error:
        raise ValueError(
            f"tokenizer.path={path} is not a tokenizer: {str(error).removeprefix('its ')}; "
            f"use tokenizer.path=<a {FILE} of byte-level BPE, or a .tiktoken table>"
        ) from None


def describes(config: TokenizerConfig, tokenizer: tiktoken.Encoding) -> bool:
    """Whether ``tokenizer`` may be what ``config`` made: of its kind, and of its size where that is known."""
    if config.name == "file":
        return build_tokenizer(config).name == tokenizer.name
    return tokenizer.name.split("-")[0] == config.name and config.size in (None, tokenizer.n_vocab)
