"""Whatever a file holds, it trains exactly as it is, or is refused in one line that says what to do."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST, story_of

from src.tokenizer import encode

STORY = story_of(400)
TRAINS = {  # content, and what is trained on where that is not the content's plain UTF-8
    "byte-order mark": (b"\xef\xbb\xbf" + STORY.encode(), STORY),
    "CRLF": (STORY.replace(" ", "\r\n").encode(), None),
    "old Macintosh line ends": (STORY.replace(" ", "\r").encode(), None),
    "NUL bytes": (STORY.replace(" ", "\0").encode(), None),
    "control characters": (STORY.replace(" ", "\x1b\x7f\x08").encode(), None),
    "literal end-of-text": (STORY.replace("bell", "<|endoftext|>").encode(), None),
    "other special tokens": (STORY.replace("bell", "<|fim_prefix|><|im_start|>").encode(), None),
    "a line without end": ((STORY.replace("\n", " ") * 40).encode(), None),
    "no space at all": ((STORY.replace(" ", "") * 40).encode(), None),
    "one character, over and over": (b"a" * 50_000, None),
    "one space, over and over": (b"x" + b" " * 50_000 + b"x" * 900, None),
    "more spaces than a regex can stack": (STORY.encode() + b" " * 1_200_000 + STORY.encode() * 70, None),
    "one line break, over and over": (b"x" + b"\n" * 50_000 + b"x" * 900, None),
    "Cyrillic": ("В чащах юга жил бы цитрус? Да, но фальшивый экземпляр! ".encode() * 40, None),
    "Chinese without spaces": ("天地玄黃宇宙洪荒日月盈昃辰宿列張".encode() * 60, None),
    "emoji and joiners": ("👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202eright to left\u202c ".encode() * 40, None),
    "odd spaces": (STORY.replace(" ", "\u2003").replace("bell", "\x1c\x85").encode(), None),
    "exactly one window and one token": (None, None),
}
REFUSED = {  # content, and a part of the message
    "empty": (b"", "is empty"),
    "byte-order mark alone": (b"\xef\xbb\xbf", "is empty"),
    "blanks only": (b" \t\r\n" * 500, "only white space"),
    "one token": (b"the", "one window needs context_length + 1 = 17"),
    "exactly context_length": (None, "one window needs context_length + 1 = 17"),
    "invalid UTF-8": (STORY.encode()[:100] + b"\xff" + STORY.encode(), "not UTF-8, see byte 100"),
    "a cut character": (STORY.encode() + "я".encode()[:1], f"not UTF-8, see byte {len(STORY)}"),
    "lone surrogates": (b"abc\xed\xa0\x80" + STORY.encode(), "not UTF-8, see byte 3"),
    "UTF-16": (STORY.encode("utf-16"), "UTF-16; convert it with iconv -f UTF-16 -t UTF-8"),
    "Latin-1": ("Ærøskøbing".encode("latin-1"), "iconv -t UTF-8"),
    "a word without end": (b"x" * 11_000_000, "more than 5,000,000 characters without a word boundary"),
    "gzip": (gzip.compress(STORY.encode()), "gzip; unpack it"),
    "a folder without text": (os.mkdir, "folder without a .txt file"),
    "a pipe": (os.mkfifo, "a device or a pipe"),
    "a link to nowhere": (lambda path: os.symlink("nowhere", path), "does not exist"),
}


@pytest.mark.parametrize("name", TRAINS)
def test_trains_exactly(tiny_run, tmp_path, name, trials):
    content, text = TRAINS[name]
    if content is None:  # 17 tokens each of training and validation: 34 words cut in halves
        content, ratio = (" the" * 34).encode(), "0.5"
    else:
        ratio = "0.9"
    text = text if text is not None else content.decode()
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    trained = tiny_run(
        *FAST,
        f"data.path={path}",
        "tokenizer=gpt2",
        "trainer.max_steps=1",
        "data.batch_size=1",
        "logger=none",
        f"data.train_ratio={ratio}",
    )
    cut = int(float(ratio) * len(text))
    assert np.array_equal(trained.datamodule.train_windows.tokens, encode(text[:cut]))
    assert np.array_equal(trained.datamodule.val_windows.tokens, encode(text[cut:]))
    assert trained.record["optimizer_steps"] == 1
    trials.passed("odd texts", 1, "trained exactly or refused in one line")


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_one_line(tiny_run, tmp_path, name, trials):
    content, message = REFUSED[name]
    path = tmp_path / "odd.txt"
    if callable(content):
        content(path)
    else:
        path.write_bytes((" the" * 32).encode() if content is None else content)
    ratio = "data.train_ratio=0.5"  # of 32 words, 16 each
    with pytest.raises(ValueError, match=r"data\.path") as error:
        tiny_run(*FAST, f"data.path={path}", "tokenizer=gpt2", ratio)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    trials.passed("odd texts", 1, "trained exactly or refused in one line")


def test_unreadable_file(tiny_run, tmp_path, monkeypatch, trials):
    path = tmp_path / "secret.txt"
    path.write_text(STORY)
    opened = Path.open

    def denied(self, *args, **kwargs):  # also to the superuser, who may read everything
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ValueError, match=r"cannot read .*secret\.txt \(Permission denied\); use data\.path="):
        tiny_run(*FAST, f"data.path={path}")
    trials.passed("odd texts", 1, "trained exactly or refused in one line")


def test_large_odd_texts(tmp_path, trials):
    """A line of 100 MB, and one character a million times: the tokens of the whole."""
    from src.data.corpus import read_corpus
    from src.data.tokens import tokens_between
    from src.tokenizer import gpt2_tokenizer

    for text in "a" * trials(200_000, 1_000_000), (STORY + " ") * (trials(2, 100) * 10**6 // len(STORY)):
        path = tmp_path / "odd.txt"
        path.write_text(text)
        assert np.array_equal(tokens_between(read_corpus(str(path)), 0, len(text), gpt2_tokenizer()), encode(text))
        trials.passed("odd texts", 1, "trained exactly or refused in one line")
