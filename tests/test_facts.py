"""What is said of a text before training is what a direct count finds."""

import gzip
import json
import random
import time

import numpy as np
import pytest
from conftest import story_of

from src.data.config import PrepareConfig
from src.data.datamodule import TextDataModule
from src.data.facts import Facts, Repetition
from src.data.overlap import RUN, overlap
from src.data.prepare import prepare_shards, read_facts
from src.tokenizer import encode

TEXTS = [
    "one\ntwo\n\nthree",
    "",
    "Ærø 天地 👩‍🚀\r\n\r\ntwo",
    "one\ntwo\n\nthree",
    "three\n" * 3,
    "",
    "one\ntwo\n\nthree ",
]


def test_dry_run_counts_what_is_there(tmp_path, command):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, None]))
    facts = read_facts(PrepareConfig(source=str(source)))
    lines = [line for text in TEXTS for line in text.split("\n") if line not in ("", "\r")]
    assert (facts.documents.total, facts.documents.share) == (7, pytest.approx(2 / 7))
    assert (facts.lines.total, facts.lines.share) == (len(lines), pytest.approx(1 - len(set(lines)) / len(lines)))
    assert (facts.characters, facts.bytes) == (sum(map(len, TEXTS)), sum(len(text.encode()) for text in TEXTS))
    assert facts.tokens == sum(1 + len(encode(text)) for text in TEXTS)
    assert (facts.longest, facts.skipped) == (max(map(len, TEXTS)), 1)
    before = list(tmp_path.iterdir())
    status, out, err = command("prepare", "dry_run=true", f"source={source}")
    assert status == 0, err
    assert list(tmp_path.iterdir()) == before
    assert out.splitlines() == [
        "documents   7, 28.6% of them repeated, the longest of 18 characters, 1 more without text",
        f"lines       {len(lines)} not empty, {1 - len(set(lines)) / len(lines):.1%} of them repeated",
        f"size        {facts.characters} characters, {facts.bytes} bytes, {facts.tokens} tokens, "
        f"{facts.bytes / facts.tokens:.2f} bytes per token",
    ]
    assert "output is needed; use output=my_shards" in command("prepare", f"source={source}")[2]


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl"])
def test_pieces_and_files_change_nothing(tmp_path, ending):
    texts = [story_of(2000), story_of(300).replace(" ", "\n"), story_of(2000)]
    for number, text in enumerate(texts):
        content = (json.dumps({"text": text}) if ending == ".jsonl" else text).encode()
        (tmp_path / f"{number}{ending}").write_bytes(gzip.compress(content) if ending == ".txt.gz" else content)
    found = [read_facts(PrepareConfig(source=str(tmp_path)), chunk=chunk) for chunk in (2**20, 50)]
    words = story_of(300).split()
    for facts in found:
        assert facts.documents.share == pytest.approx(1 / 3)
        assert facts.lines.total == 302
        assert facts.lines.share == pytest.approx(1 - (len(set(words)) + 1) / 302)
        assert facts.longest == len(texts[0])
    assert found[0].described() == found[1].described()


def test_parts_and_max_tokens_are_those_of_the_shards(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(story_of(100 + number))
    for options in {"part": "2/2"}, {"max_tokens": 200}, {"part": "1/2", "max_tokens": 250}:
        asked = PrepareConfig(
            source=str(tmp_path), output=str(tmp_path / f"out{len(options)}{min(options)}"), **options
        )
        facts, manifest = read_facts(asked), prepare_shards(asked)
        counts = facts.tokens, facts.documents.total, facts.characters
        assert counts == tuple(manifest[key] for key in ("tokens", "documents", "characters"))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8, see byte 3; use source="):
        read_facts(PrepareConfig(source=str(tmp_path)))


@pytest.mark.parametrize("distinct", [1, 900, 50_000])
def test_repetition_is_exact_for_few_values_and_close_for_many(distinct):
    """5,000 hashes are kept: an error of 2 % of the distinct values is one standard deviation."""
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**64, distinct, dtype=np.uint64)
    given = np.concatenate([values, generator.choice(values, 2 * distinct)])
    generator.shuffle(given)
    found = Repetition(limit=5000)
    for first in range(0, len(given), 700):
        found.add(given[first : first + 700])
        assert len(found._known) <= 5000
        assert found._waiting < 5000 + 700
    assert found.share == pytest.approx(2 / 3, abs=1e-9 if distinct <= 5000 else 0.03)


def test_repetition_of_a_text_without_any_is_nothing():
    facts = Facts()
    for number in range(3000):
        facts.add([None, f"line {number}\nand {number}"])
    facts.finish()
    assert (facts.lines.total, facts.lines.share, facts.documents.share) == (6000, 0, 0)


def naive_overlap(train: list[int], val: list[int], length: int) -> float:
    run = min(RUN, length + 1)
    known = {tuple(train[at : at + run]) for at in range(len(train) - run + 1)}
    windows = [val[at : at + length + 1] for at in range(0, len(val) - length, length)]
    seen = [any(tuple(one[at : at + run]) in known for at in range(len(one) - run + 1)) for one in windows]
    return sum(seen) / len(seen)


@pytest.mark.parametrize("length", [1, 2, 7, 49, 50, 51, 64])
def test_overlap_is_that_of_all_sequences(length):
    dice, shares = random.Random(length), set()
    for _ in range(30):
        train = [dice.randrange(3000) for _ in range(900)]
        val = [dice.randrange(3000) for _ in range(dice.randrange(length + 1, 700))]
        for _ in range(dice.randrange(4)):  # copies of up to 80 tokens
            size, at, to = dice.randrange(80), dice.randrange(900), dice.randrange(len(val))
            val[to : to + size] = train[at : at + size]
        val = val if len(val) > length else val * (length + 1)
        found = overlap(np.array(train, dtype=np.uint16), np.array(val, dtype=np.uint16), length)
        assert found == naive_overlap(train, val, length)
        shares.add(found)
    assert len(shares) > 2


def test_overlap_across_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    train = generator.integers(0, 50_000, 3000).astype(np.uint16)
    val = np.concatenate([generator.integers(0, 50_000, 128), train[980:1032], generator.integers(0, 9, 13)])
    monkeypatch.setattr("src.data.overlap.BLOCK", 1000)
    assert overlap(train, val, 64) == 1 / 3


def test_overlap_of_eight_million_tokens_takes_about_a_second():
    generator = np.random.default_rng(0)
    train = generator.integers(0, 50_000, 2**23).astype(np.uint16)
    started = time.perf_counter()
    assert overlap(train, train[5 : 2**20], 1024) == 1
    assert time.perf_counter() - started < 10  # on a machine that does other things too


def test_card_of_a_training_run(tmp_path):
    for number, words in enumerate((400, 400, 90)):
        (tmp_path / f"{number}.txt").write_text(story_of(words) + "\nthe end")
    text = TextDataModule(path=str(tmp_path), context_length=16)
    text.setup()
    about = text.summary()
    assert about["documents"].startswith("3, 33.3% of them repeated, the longest of ")
    assert about["lines"] == "6 not empty, 50.0% of them repeated"
    total = len(text.train_windows.tokens) + len(text.val_windows.tokens)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.txt"))
    assert about["size"] == f"{size:,} characters, {size:,} bytes, {total:,} tokens, {size / total:.2f} bytes per token"
    share = naive_overlap(text.train_windows.tokens.tolist(), text.val_windows.tokens.tolist(), 16)
    assert share > 0.5
    assert about["val"].endswith(f"; {share:.1%} of the windows share 17 tokens in a row with the training split")


def test_large_texts_are_not_read_for_the_card(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(story_of(900))
    monkeypatch.setattr("src.data.facts.SMALL", 1000)
    monkeypatch.setattr("src.data.overlap.MOST", 100)
    text = TextDataModule(path=str(tmp_path), context_length=16)
    text.setup()
    about = text.summary()
    assert about["size"].endswith("tokens; repetition is counted up to 1,000 characters")
    assert "lines" not in about
    assert about["val"].endswith("tokens; compared with training up to 100 training tokens only")
