import hashlib
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.tokenizer import pieces as cuts
from src.tokenizer.encoding import (
    END_OF_TEXT,
    RANK_TABLE,
    encode,
    gpt2_tokenizer,
    text_to_token_ids,
    token_byte_counts,
    token_bytes,
    token_ids_to_text,
)
from src.tokenizer.pieces import separable, split_white_space


def test_rank_table_is_the_one_that_tiktoken_pins():
    from tiktoken_ext import openai_public

    digest = hashlib.sha256(RANK_TABLE.read_bytes()).hexdigest()
    assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert digest in openai_public.r50k_base.__code__.co_consts


def test_known_encodings():
    # The book, section 2.5 and 5.1; GPT-2's published vocabulary.
    assert text_to_token_ids("Every effort moves you").tolist() == [[6109, 3626, 6100, 345]]
    assert encode("Akwirw ier").tolist() == [33901, 86, 343, 86, 220, 959]
    assert gpt2_tokenizer().n_vocab == 50257
    assert gpt2_tokenizer().eot_token == 50256


def test_needs_neither_network_nor_a_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the tokenizer opened a connection"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gpt2_tokenizer.cache_clear()
    assert encode("bell").tolist() == [7923]
    assert list(tmp_path.iterdir()) == []


@given(st.text())
def test_round_trip(text):
    for policy in "parse", "text":
        assert token_ids_to_text(text_to_token_ids(text, special_tokens=policy)) == text


def test_literal_end_of_text_follows_one_policy():
    text = "a<|endoftext|>b"
    assert encode(text, special_tokens="parse").tolist() == [64, 50256, 65]
    assert 50256 not in encode(text, special_tokens="text")
    assert token_ids_to_text(text_to_token_ids(text, special_tokens="text")) == text


def test_what_no_utf8_can_say_becomes_the_replacement_character():
    assert token_ids_to_text(text_to_token_ids("a\ud800b")) == "a\ufffdb"
    assert token_ids_to_text(torch.tensor([64, 50300])) == "a\ufffd"  # an id of a padded vocabulary
    half = text_to_token_ids("\U0001f600")[:, :1]
    assert token_ids_to_text(half) == "\ufffd"


def test_several_rows_have_no_single_text():
    with pytest.raises(ValueError, match="one row, not 2"):
        token_ids_to_text(torch.zeros(2, 3, dtype=torch.int64))


def test_smallest_array_that_holds_the_vocabulary(letters):
    assert encode("some text").dtype == np.uint16
    assert encode("some text", letters).tolist() == list(b"some text")


def test_byte_counts_add_up_to_the_text(letters):
    text = "Bells, ünïcode and \U0001f600."
    counts = token_byte_counts()
    assert counts[encode(text)].sum() == len(text.encode())
    assert counts[50256] == 0
    assert token_byte_counts(letters).tolist() == [1] * 256 + [0]
    assert token_bytes(345) == b" you"


ODD = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r'sdmtlve.1a\u00a0\u2003\x1c\x85<|endoftext|>"), st.characters(exclude_categories=["Cs"])
    )
)


@given(st.lists(ODD), st.sampled_from(["parse", "text"]))
def test_pieces_of_a_text_give_the_tokens_of_the_whole(pieces, special_tokens):
    for parts in pieces, [part for piece in pieces for part in (piece, "<|endof", "text|> ")]:
        whole = encode("".join(parts), special_tokens=special_tokens)
        tokens = [encode(part, special_tokens=special_tokens) for part in separable(parts)]
        assert [token for part in tokens for token in part] == whole.tolist()


@given(st.lists(st.one_of(ODD, st.sampled_from([" ", "\n", END_OF_TEXT, "x", "\x1c"]))), st.integers(1, 4))
def test_long_white_space_is_cut_where_it_changes_nothing(pieces, long):
    text, reference = "".join(pieces), gpt2_tokenizer().encode
    for special in set(), {END_OF_TEXT}:
        parts = split_white_space(text, special, long)
        assert "".join(parts) == text
        tokens = [token for part in parts for token in reference(part, allowed_special=special, disallowed_special=())]
        assert tokens == reference(text, allowed_special=special, disallowed_special=())


@pytest.mark.parametrize("space", [" ", "\n", "\u2003", " \n"])
def test_white_space_beyond_the_stack_of_the_regex(space):
    run = space * (1_200_000 // len(space))
    for begin, end in ("", "x"), ("a", END_OF_TEXT + run + "b"):
        text = begin + run + end
        tokens = encode(text)
        assert token_byte_counts()[tokens].sum() == len(text.replace(END_OF_TEXT, "").encode())
        assert tokens[-1] == encode(text[-1:] if space == "\n" else text[-2:])[-1]
        kept = separable([text[first : first + 2**18] for first in range(0, len(text), 2**18)])
        assert np.array_equal(np.concatenate([encode(piece) for piece in kept]), tokens)


def test_only_so_much_is_held_for_want_of_a_word_boundary(monkeypatch):
    """Whether a text is refused does not depend on the pieces that it comes in."""
    monkeypatch.setattr(cuts, "LONGEST", 10)
    for word, fits in (" xxxxxxxxx", True), (" xxxxxxxxxx", False), (" \n\n  xxxxx", True), (" \n\n  xxxxxx", False):
        text = f"a b{word} c"
        for size in 1, 2, 3, 7, 10:
            pieces = [text[first : first + size] for first in range(0, len(text), size)]
            if fits:
                assert "".join(separable(pieces)) == text
            else:
                with pytest.raises(
                    ValueError, match=r"^source: a\.txt has more than 10 characters .*; use source=<the file"
                ):
                    list(separable(pieces, "source: a.txt"))
