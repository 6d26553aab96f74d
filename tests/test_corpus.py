import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data import corpus
from src.data.corpus import STORY, read_corpus, split_documents, tokenise
from src.tokenizer import encode, gpt2_tokenizer


def test_packaged_story_is_enough_for_the_main_job():
    story = read_corpus()
    assert 19_000 < len(story.documents[0]) < 22_000
    assert story.sha256 == hashlib.sha256(STORY.read_bytes()).hexdigest()


def test_file_folder_and_glob(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.txt").write_text("third")
    (tmp_path / "notes.md").write_text("other")
    (tmp_path / "empty.txt").write_text("")
    assert read_corpus(str(tmp_path / "notes.md")).documents == ["other"]
    assert read_corpus(str(tmp_path)).documents == ["first", "second", "third"]
    assert read_corpus(str(tmp_path / "*.md")).documents == ["other"]
    assert read_corpus(str(tmp_path / "**" / "c.txt")).documents == ["third"]


def test_text_is_kept_to_the_byte_but_for_a_byte_order_mark(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\x00\n")
    assert read_corpus(str(file)).documents == ["one\r\ntwo\x00\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\t ", "nothing but white space"),
        (b"abc\xffdef", "not UTF-8, see byte 3"),
        ("UTF-16".encode("utf-16"), "not UTF-8, see byte 0"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_cure(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        read_corpus(str(file))
    assert message in str(error.value)
    assert "data.path=" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_without_text(tmp_path):
    with pytest.raises(ValueError, match=r"folder without a \.txt file"):
        read_corpus(str(tmp_path))


@given(st.lists(st.text(min_size=1), min_size=1), st.floats(0.01, 0.99))
def test_split_is_contiguous_and_cut_by_characters(documents, ratio):
    train, val = split_documents(documents, ratio)
    whole = "".join(documents)
    cut = int(ratio * len(whole))
    assert "".join(train) == whole[:cut]
    assert "".join(val) == whole[cut:]


def test_documents_are_joined_by_end_of_text():
    tokenizer = gpt2_tokenizer()
    assert tokenise(["one", "two"], tokenizer).tolist() == [*encode("one"), 50256, *encode("two")]
    assert tokenise([], tokenizer).tolist() == []


URL = "https://example.org/the-text.txt"


def test_download_is_cached_and_verified(tmp_path, monkeypatch):
    import pooch

    content, calls = b"a pinned text", []

    def fetch(url, output_file, pooch):
        calls.append(url)
        with open(output_file, "wb") as file:
            file.write(content)

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **_: fetch)
    monkeypatch.setattr("time.sleep", lambda _: None)
    pinned = hashlib.sha256(content).hexdigest()
    assert read_corpus(url=URL, sha256=pinned).documents == ["a pinned text"]
    assert read_corpus(url=URL, sha256=pinned).documents == ["a pinned text"]
    assert calls == [URL]
    with pytest.raises(ValueError, match=r"could not be fetched.*data\.path="):
        read_corpus(url=URL, sha256="0" * 64)
    assert [file.name for file in (tmp_path / corpus.CACHE_NAME).iterdir()] == ["the-text.txt"]


def test_download_without_network(tmp_path, monkeypatch):
    import pooch

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ValueError, match=r"could not be fetched.*data\.path=") as error:
        read_corpus(url=URL, sha256="0" * 64)
    assert "\n" not in str(error.value)


def test_only_https(tmp_path):
    with pytest.raises(ValueError, match="not https"):
        read_corpus(url="http://example.org/text.txt", sha256="0" * 64)
