"""gigatoken gives the tokens of tiktoken, and the shards made with it are those made without it, to the byte."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data import fast_encoding
from src.data.config import PrepareConfig
from src.data.corpus import read_corpus
from src.data.fast_encoding import FastEncoder, encode_pieces, encoder
from src.data.prepare import prepare_shards
from src.data.tokens import tokens_between
from src.tokenizer import END_OF_TEXT, encode, gpt2_tokenizer, separable

POLICIES = "parse", "text"
ODD = st.one_of(
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\t ", "'s", "'LL", "1", "234", ".", "=", "the", "é", "天地", "ſ", "\x00"]
    ),
    st.sampled_from(
        ["\u2003", "\xa0", "\x85", "\x1c", "\u3000", "\u2028", "👩\u200d🚀", "e\u0301", "\ud83d", "\udc00"]
    ),
    st.sampled_from([END_OF_TEXT, "<|endof", "text|>", "<|", "<"]),
    st.characters(),
)
TEXTS = st.lists(ODD, max_size=200).map("".join)


def documents(texts: list[str]) -> list[str | None]:
    """Pieces as prepare cuts them: an end-of-text token before each document, which is cut before white space."""
    return [piece for text in texts for piece in (None, *separable(text[at : at + 7] for at in range(0, len(text), 7)))]


@pytest.fixture(scope="module", params=POLICIES)
def both(request):
    """A list of pieces to its tokens by gigatoken and by tiktoken."""
    pytest.importorskip("gigatoken")
    fast = FastEncoder(gpt2_tokenizer(), request.param)
    return lambda pieces: (fast(pieces).tolist(), encode_pieces(pieces, gpt2_tokenizer(), request.param).tolist())


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_same_tokens(both, texts):
    fast, plain = both(documents(texts))
    assert fast == plain


@pytest.mark.parametrize("both", ["parse"], indirect=True)
def test_same_tokens_for_every_character(both):
    """Letter, number, white space or other, for Unicode's tables differ from version to version: an apostrophe joins
    the s behind it except after other characters."""
    every = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for first in range(0, len(every), 4096):
        fast, plain = both([f"{char}'s {char}1\n" for char in every[first : first + 4096]])
        assert fast == plain


@pytest.mark.parametrize("run", [" ", "\n", "\u2003", "a", "天", "=", "ab1"])
def test_same_tokens_for_what_has_no_end(both, run):
    for pieces in [run * 200_000], ["x" + run * 20_000, None, run * 20_000 + "x"], ["", None, None, ""], []:
        fast, plain = both(pieces)
        assert fast == plain


def test_more_white_space_than_the_regex_of_tiktoken_can_stack(both):
    fast, plain = both([" " * 1_200_000 + "x"])
    assert fast == plain


def test_a_tokenizer_is_replaced_after_its_life(monkeypatch):
    pytest.importorskip("gigatoken")
    fast = FastEncoder(gpt2_tokenizer(), "parse")
    used = fast._idle[0][0]
    assert fast(["a bell"]).tolist() == encode("a bell").tolist()
    assert fast._idle[0][0] is used
    monkeypatch.setattr(fast_encoding, "LIFE", 0)
    for _ in range(2):
        assert fast(["a bell"]).tolist() == encode("a bell").tolist()
        assert fast._idle == []


def test_another_tokenizer_and_other_tokens_leave_it_to_tiktoken(letters, monkeypatch, caplog):
    pytest.importorskip("gigatoken")
    text = "1,000,000 bells rang.\n\nThen 20000000"
    pieces = [None, text]
    with caplog.at_level("INFO"):
        assert encoder(letters, "parse", pieces)(pieces).tolist() == [256, *text.encode()]
        monkeypatch.setitem(fast_encoding.PRETOKENIZERS, gpt2_tokenizer()._pat_str, "gpt4")
        assert encoder(gpt2_tokenizer(), "parse", pieces)(pieces).tolist() == [50256, *encode(text).tolist()]
    assert caplog.messages == [
        "tokenizing with tiktoken (gigatoken is used for GPT-2's pattern and special token only)",
        "tokenizing with tiktoken (gigatoken gives other tokens for this text)",
    ]


def test_shards_are_the_same_without_it(tmp_path, monkeypatch, caplog):
    texts = [
        "Ærø 天地 👩‍🚀  bells\n\n" * 30,
        "",
        f"one {END_OF_TEXT} in the text ",
        "\ud800 half",
        "spaces" + " " * 500,
    ] * 4
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def made(name: str, policy: str, **how) -> dict[str, bytes]:
        asked = {"shard_tokens": 1000, "special_tokens": policy, "workers": how.pop("workers", None), "name": "s"}
        prepare_shards(PrepareConfig(source=str(source), output=str(tmp_path / name), **asked), **how)
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != ".lock"}

    for policy in POLICIES:
        with monkeypatch.context() as patch, caplog.at_level("INFO"):
            patch.setitem(sys.modules, "gigatoken", None)
            expected = made(f"{policy} without", policy, chunk=500)
        assert caplog.messages[-1].endswith('use pip install -e ".[fast]"')
        for number, how in enumerate([{"chunk": 100, "workers": 3}, {"chunk": 2000, "workers": 1}, {}]):
            assert made(f"{policy} {number}", policy, **how) == expected


def test_a_large_text_is_tokenized_with_it(tmp_path, caplog):
    pytest.importorskip("gigatoken")
    text = "So, said the heron, the bell rang one.\n" * 60_000
    (tmp_path / "a.txt").write_text(text)
    with caplog.at_level("INFO"):
        tokens = tokens_between(read_corpus(str(tmp_path / "a.txt")), 0, len(text), gpt2_tokenizer())
    assert caplog.messages == ["tokenizing with gigatoken"]
    assert np.array_equal(tokens, encode(text))
