import hashlib
import itertools
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from src.cli.overrides import CONF
from src.data import corpus, token_cache, tokens
from src.data.corpus import PREPARED, STORY, read_corpus
from src.data.documents import ENDINGS
from src.data.files import find_files
from src.data.tokens import split_tokens, tokens_between
from src.tokenizer import encode, gpt2_tokenizer


def documents(path, first: int = 0, last: int = sys.maxsize) -> list[str]:
    pieces = read_corpus(str(path)).pieces(first, last)
    return ["".join(text for _, text in group) for _, group in itertools.groupby(pieces, key=lambda piece: piece[0])]


def test_packaged_story_is_enough_for_the_main_job():
    story = read_corpus()
    assert 19_000 < story.characters[0] < 22_000
    assert story.sha256 == hashlib.sha256(STORY.read_bytes()).hexdigest()


def test_file_folder_and_glob(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.txt").write_text("third")
    (tmp_path / "notes.md").write_text("other")
    (tmp_path / "empty.txt").write_text("")
    assert documents(tmp_path / "notes.md") == ["other"]
    assert documents(tmp_path) == ["first", "second", "third"]
    assert documents(tmp_path / "*.md") == ["other"]
    assert documents(tmp_path / "**" / "c.txt") == ["third"]


def test_links_are_followed_and_each_file_is_read_once(tmp_path, monkeypatch):
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for file in texts / "a" / "one.txt", texts / "b[1]" / "two.txt", elsewhere / "deep" / "three.txt":
        file.parent.mkdir(parents=True)
        file.write_text(file.stem)
    (texts / "a" / ".hidden").mkdir()
    (texts / "a" / ".hidden" / "four.txt").write_text("four")
    for link, target in {
        texts / "a" / "up": texts,  # two loops, which a glob would follow in 2 ** 40 ways
        texts / "b[1]" / "up": texts,
        texts / "a" / "0.txt": texts / "b[1]" / "two.txt",
        texts / "again": texts / "b[1]",
        texts / "linked": elsewhere,
        elsewhere / "back": texts / "a",
    }.items():
        link.symlink_to(target)
    assert documents(texts) == ["four", "one", "two", "three"]
    one, two, three = texts / "a" / "one.txt", texts / "b[1]" / "two.txt", texts / "linked" / "deep" / "three.txt"

    def found(*pattern: str) -> list[Path]:
        return find_files(str(tmp_path.joinpath(*pattern)), "data.path", ())

    assert found("texts", "**", "*.txt") == found("texts", "**") == [one, two, three]
    assert found("texts", "*", "*.txt") == [one, two]
    assert found("texts", "**", "deep", "**", "*.txt") == [three]
    assert found("*", "**", "*.txt") == [elsewhere / "deep" / "three.txt", one, two]
    monkeypatch.chdir(texts)
    assert find_files("**/*.txt", "data.path", ()) == [
        Path("a/one.txt"),
        Path("b[1]/two.txt"),
        three.relative_to(texts),
    ]


@pytest.mark.parametrize("ending", PREPARED)
def test_what_is_to_be_prepared_names_the_command(tmp_path, ending):
    assert ending in ENDINGS
    path = tmp_path / f"a{ending}"
    path.write_text('{"text": "a"}')
    command = f"python -m src.prepare source={path} output=my_shards, then data=shards data.path=my_shards"
    with pytest.raises(ValueError, match=f"^data.path: {path} is not plain text; use {command}$"):
        read_corpus(str(path))
    with pytest.raises(ValueError, match=f"^data.path: {tmp_path} is not plain text; use python -m src.prepare"):
        read_corpus(str(tmp_path))


def test_hash_tells_where_files_end(tmp_path):
    for name, parts in ("one", ("ab", "c")), ("two", ("a", "bc")):
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            (tmp_path / name / f"{number}.txt").write_text(part)
    assert read_corpus(str(tmp_path / "one")).sha256 != read_corpus(str(tmp_path / "two")).sha256


def test_text_is_kept_to_the_byte_but_for_a_byte_order_mark(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\x00\n")
    assert documents(file) == ["one\r\ntwo\x00\n"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.integers(1, 9), st.data())
def test_any_part_of_any_text_read_in_any_blocks(tmp_path_factory, texts, block, data):
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    texts = [text.removeprefix("\ufeff") for text in texts]
    whole = "".join(texts)
    if not whole.strip():
        return
    first = data.draw(st.integers(0, len(whole)))
    last = data.draw(st.integers(first, len(whole)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", block)
        read = read_corpus(str(folder))
        assert read.characters == [len(text) for text in texts]
        assert "".join(text for _, text in read.pieces(first, last)) == whole[first:last]
        numbers = [number for number, _ in read.pieces(first, last)]
        assert numbers == sorted(numbers)
        assert read.cut(0.9) == int(0.9 * len(whole))


def test_documents_are_joined_by_end_of_text(tmp_path):
    for name in "one", "two", "three":
        (tmp_path / f"{len(name)}{name}.txt").write_text(name)
    read, tokenizer = read_corpus(str(tmp_path)), gpt2_tokenizer()
    whole = tokens_between(read, 0, 11, tokenizer)
    assert whole.tolist() == [*encode("one"), 50256, *encode("two"), 50256, *encode("three")]
    train, val = split_tokens(read, 0.5, tokenizer)  # 5 of the 11 characters
    assert train.tolist() == [*encode("one"), 50256, *encode("tw")]
    assert val.tolist() == [*encode("o"), 50256, *encode("three")]


def test_large_text_is_tokenised_once_into_a_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tokens, "LARGE", 100)
    file, cache, tokenizer = tmp_path / "text.txt", tmp_path / "cache", gpt2_tokenizer()
    text = "The ferry rang; <|endoftext|> nobody waited. " * 50
    file.write_text(text)

    def made(**options) -> tuple[np.ndarray, bool]:
        caplog.clear()
        with caplog.at_level("INFO"):
            train, val = split_tokens(read_corpus(str(file)), 0.9, tokenizer, cache_dir=str(cache), **options)
        assert isinstance(train[:], np.memmap)
        return np.concatenate([train[:], val[:]]), "once, into" in caplog.text

    cut = int(0.9 * len(text))
    expected = np.concatenate([encode(text[:cut]), encode(text[cut:])])
    first, fresh = made()
    assert fresh
    assert np.array_equal(first, expected)
    assert made()[1] is False
    policy, fresh = made(special_tokens="text")
    assert fresh
    assert not np.array_equal(policy, expected)
    file.write_text(text.replace("ferry", "merry"))  # of the same length
    assert made()[1] is True
    file.write_text(text)
    assert len(list(cache.iterdir())) == 3
    for path in cache.glob("*/*/*.bin"):
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    again, fresh = made()
    assert fresh
    assert "is damaged: tokenizing again" in caplog.text
    assert np.array_equal(again, expected)
    assert not list(cache.rglob("*.part"))
    for folder in list(cache.iterdir()):
        folder.rename(f"{folder}.part")  # as if their processes had been killed at the last moment
    assert made()[1] is True
    assert [file.suffix for file in cache.iterdir()] == [""]


@pytest.mark.parametrize("train_ratio", [0.3, 0.5, 0.9, 1.0])
def test_a_large_text_has_the_tokens_of_a_small_one(tmp_path, monkeypatch, train_ratio):
    """End-of-text tokens between documents included, over empty documents and several shards of either split."""
    folder, cache, tokenizer = tmp_path / "texts", tmp_path / "cache", gpt2_tokenizer()
    folder.mkdir()
    for number, text in enumerate(["", "one ferry", "", "x" * 30, "The ferry rang; nobody waited. " * 20, "end", ""]):
        (folder / f"{number}.txt").write_text(text)
    read = read_corpus(str(folder))
    expected = split_tokens(read, train_ratio, tokenizer)
    monkeypatch.setattr(tokens, "LARGE", 100)
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 20)
    made = split_tokens(read, train_ratio, tokenizer, cache_dir=str(cache))
    assert [part[:].tolist() for part in made] == [part.tolist() for part in expected]
    names = {path.name for path in cache.glob("*/*/*.bin")}
    roles = {"train": len(expected[0]), "val": len(expected[1])}
    assert names == {f"text_{role}_{at // 20:06d}.bin" for role, count in roles.items() for at in range(0, count, 20)}


def test_processes_that_share_a_cache_tokenise_in_turns(tmp_path, monkeypatch):
    """In containers of their own they may have the same process number; here two threads have."""
    monkeypatch.setattr(tokens, "LARGE", 100)
    file, cache = tmp_path / "text.txt", tmp_path / "cache"
    file.write_text("The ferry rang; nobody waited. " * 50)
    cache.mkdir()
    claimed = FileLock(cache / ("b" * 32 + ".lock"))
    claimed.acquire()  # by a process that is tokenizing another text
    for name in "a" * 32 + ".part", "b" * 32 + ".part", "mine.part":
        (cache / name).mkdir()
        (cache / name / "text_train_000000.bin.part").write_text("cut off")
    write, begun = token_cache._write, []

    def slowly(path, *arguments):
        begun.append(path)
        time.sleep(0.3)
        return write(path, *arguments)

    monkeypatch.setattr(token_cache, "_write", slowly)
    with ThreadPoolExecutor(3) as pool:
        made = [
            pool.submit(split_tokens, read_corpus(str(file)), 0.9, gpt2_tokenizer(), cache_dir=str(cache))
            for _ in range(3)
        ]
    assert len(begun) == 1
    for each in made:
        assert [part[:].tolist() for part in each.result()] == [part[:].tolist() for part in made[0].result()]
    left = {begun[0].name, "b" * 32 + ".lock", "b" * 32 + ".part", "mine.part"}
    assert {path.name for path in cache.iterdir()} == left
    claimed.release()


def test_cache_that_cannot_be_written_is_told_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "LARGE", 100)
    (tmp_path / "text.txt").write_text("word " * 100)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.* cannot be written to .*; use data\.cache_dir=<"):
        split_tokens(read_corpus(str(tmp_path / "text.txt")), 0.9, gpt2_tokenizer(), cache_dir=str(tmp_path / "cache"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures itself in Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path, trials):
    megabytes = trials(50, 1000)
    story = STORY.read_bytes()
    with (tmp_path / "large.txt").open("wb") as file:
        for _ in range(megabytes * 10**6 // len(story)):
            file.write(story)
    code = (
        "import sys\n"
        "from src.data.corpus import read_corpus\n"
        "from src.data.tokens import split_tokens\n"
        "from src.tokenizer import gpt2_tokenizer\n"
        "train, val = split_tokens(read_corpus(sys.argv[1]), 0.9, gpt2_tokenizer(), cache_dir=sys.argv[2])\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(len(train) + len(val), int(peak.split()[1]) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.txt"), str(tmp_path / "cache")],
        cwd=CONF.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    count, peak = map(int, done.stdout.split())
    assert count > megabytes * 10**6 / 5
    assert peak < 500
    trials.passed(f"{megabytes:,} MB of text tokenized into the cache; peak memory {peak} MB", 1, "under 500 MB")


URL, MIRROR = "https://example.org/the-text.txt", "https://example.com/copy.txt"


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A network in which each address offers some content; the cache lies in ``tmp_path``."""
    import pooch

    from src.data import download

    offered: dict[str, bytes] = {}
    calls = []

    def downloader(size):
        def fetch(url, target, _pooch):
            calls.append(url)
            if url not in offered:
                raise OSError("no route to host")
            Path(target).write_bytes(offered[url])

        return fetch

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr(download, "_downloader", downloader)
    return offered, calls


def test_download_is_cached_and_verified(tmp_path, network):
    offered, calls = network
    offered[URL] = b"a pinned text"
    pinned = hashlib.sha256(offered[URL]).hexdigest()
    for _ in range(2):
        read = read_corpus(url=URL, sha256=pinned)
        assert [text for _, text in read.pieces(0, 99)] == ["a pinned text"]
    assert calls == [URL]
    with pytest.raises(ValueError, match=r"could not be fetched.*; use data\.path="):
        read_corpus(url=URL, sha256="0" * 64)
    assert [file.name for file in (tmp_path / "gpt2-lightning").iterdir()] == ["the-text.txt"]


def test_mirror_where_the_first_address_fails_or_lies(network):
    offered, calls = network
    offered[URL], offered[MIRROR] = b"another text", b"a pinned text"
    pinned = hashlib.sha256(offered[MIRROR]).hexdigest()
    assert read_corpus(url=URL, sha256=pinned, mirrors=[MIRROR]).sha256 == pinned
    assert calls == [URL, MIRROR]


def test_download_without_network(tmp_path, monkeypatch):
    import pooch

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ValueError, match=r"could not be fetched.*; use data\.path=") as error:
        read_corpus(url=URL, sha256="0" * 64, mirrors=[MIRROR])
    assert "\n" not in str(error.value)
    assert "example.org" in str(error.value)
    assert "example.com" in str(error.value)


@pytest.mark.parametrize("path", ["/redirected", "/endless", "/short"])
def test_a_server_that_cheats(path, tmp_path, monkeypatch):
    """A redirection away from https, more bytes than were pinned, fewer: nothing of it reaches the cache."""
    import io

    import pooch
    import requests
    from requests.adapters import HTTPAdapter

    def send(self, request, **_):
        response = requests.Response()
        response.request, response.url, response.status_code = request, request.url, 200
        response.raw = io.BytesIO(b"x" * (5 if path == "/short" else 10**6))
        if path == "/redirected":
            response.status_code, response.headers["location"] = 302, "http://example.org/text.txt"
        return response

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr(HTTPAdapter, "send", send)
    reason = {"/redirected": "http://", "/endless": "more than the 100 bytes", "/short": "SHA256|hash"}[path]
    with pytest.raises(ValueError, match=rf"could not be fetched.*({reason})"):
        read_corpus(url=f"https://example.org{path}/text.txt", sha256="0" * 64, size=100)
    assert not list((tmp_path / "gpt2-lightning").glob("*"))


@pytest.mark.parametrize("url", ["http://example.org/text.txt", "file:///etc/passwd", "ftp://example.org/text.txt"])
def test_only_https(url):
    with pytest.raises(ValueError, match="not https"):
        read_corpus(url=url, sha256="0" * 64)
    with pytest.raises(ValueError, match="not https"):
        read_corpus(url=URL, mirrors=[re.sub("example", "mirror", url)], sha256="0" * 64)
