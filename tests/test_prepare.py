"""Text of any size becomes the same shards, whoever makes them, in what pieces, and however often they are killed."""

import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import story_of
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from src.cli.overrides import CONF
from src.data import documents, prepare, progress, shard_writer
from src.data.config import PrepareConfig, TokenizerConfig
from src.data.manifest import MANIFEST
from src.data.pipeline import merged
from src.data.prepare import prepare_shards
from src.data.shards import HEADER, MAGIC, read_shards
from src.tokenizer import encode, gpt2_tokenizer

TEXTS = [
    story_of(400),
    "",
    "odd\r\n\u2003 spaces\x1c ",
    "Ærø 天地 👩‍🚀 " * 40,
    "one <|endoftext|> in the text",
    story_of(900),
]
EXPECTED = [token for text in TEXTS for token in (50256, *encode(text).tolist())]


def made(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


def tokens_in(folder: Path) -> list[int]:
    shards = sorted(folder.glob("*.bin"), key=lambda file: file.stem.split("_")[-1])
    return [token for shard in shards for token in np.fromfile(shard, "<u2", offset=HEADER).tolist()]


def json_lines(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return path


def config(source, output: Path, **options) -> PrepareConfig:
    source = [str(path) for path in source] if isinstance(source, list) else str(source)
    options = {"name": "s", "shard_tokens": 200, "val_tokens": 50, **options}
    return PrepareConfig(source=source, output=str(output), **options)


def write(path: Path, texts: list[str]) -> Path:
    """``texts`` as a file of the format that ``path`` is called by."""
    if ".jsonl" in path.name:
        json_lines(path, texts)
    elif ".parquet" in path.name:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"id": [1] * len(texts), "text": texts}), path, row_group_size=4)
        return path
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif path.suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        whole = path.read_bytes()
        frames = [pyarrow.compress(part, "zstd", asbytes=True) for part in (whole[:99], whole[99:])]
        path.write_bytes(b"".join(frames))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_shards_are_those_of_llm_c(tmp_path, name):
    manifest = prepare_shards(config(write(tmp_path / name, TEXTS), tmp_path / "out"))
    files = made(tmp_path / "out")
    names = ["s_train_000001.bin", "s_val_000000.bin"]
    assert [file for file in files if "000000" in file or "000001" in file] == names
    for shard in manifest["shards"]:
        content = files[shard["file"]]
        assert np.frombuffer(content, "<i4", 256).tolist() == [MAGIC, 1, shard["tokens"], *[0] * 253]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert [shard["tokens"] for shard in manifest["shards"]][:3] == [50, 200, 200]
    assert tokens_in(tmp_path / "out") == EXPECTED
    assert json.loads(files[MANIFEST]) == manifest
    assert (manifest["tokens"], manifest["documents"]) == (len(EXPECTED), len(TEXTS))
    assert manifest["characters"] == sum(map(len, TEXTS))


def test_text_files_are_documents_in_order(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "notes.md").write_text("other")
    for source in tmp_path, [tmp_path / "a.txt.gz", tmp_path / "b*"]:
        output = tmp_path / "out" / str(isinstance(source, list))
        prepare_shards(config(source, output, val_tokens=0))
        assert tokens_in(output) == [50256, *encode("first"), 50256, *encode("second\r\n")]
        assert [file.name for file in output.glob("*.bin")] == ["s_train_000000.bin"]


def test_literal_end_of_text_and_lone_surrogates(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a <|endoftext|> b"}\n\n \r\n{"text": "\\ud800 \\ud83d\\ude80"}')
    prepare_shards(config(file, tmp_path / "out", val_tokens=0, special_tokens="text"))
    spelt = encode("a <|endoftext|> b", special_tokens="text").tolist()
    assert tokens_in(tmp_path / "out") == [50256, *spelt, 50256, *encode("\ufffd 🚀")]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text("ab \n\u2003é天'1", max_size=60) | st.none(), min_size=1, max_size=8), st.sampled_from([0, None]),
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.sampled_from([".jsonl", ".txt"]),
)  # fmt: skip
def test_same_bytes_whatever_the_pieces_and_workers(tmp_path_factory, texts, val, chunk, shard, workers, ending):
    folder, there = tmp_path_factory.mktemp("any"), [text for text in texts if text is not None]
    if not any(there):
        return
    if ending == ".txt":
        texts = there
        files = [folder / f"{number}.txt" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_bytes(text.encode())
    else:
        files = [json_lines(folder / "all.jsonl", texts)]
    sizes = {"shard_tokens": shard, "val_tokens": val}
    whole = prepare_shards(config(files, folder / "whole", **sizes, workers=1))
    prepare_shards(config(files, folder / "other", **sizes, workers=workers), chunk=chunk, save_every=0)
    assert made(folder / "whole") == made(folder / "other")
    assert whole["characters"] == sum(map(len, there))
    assert (whole["documents"], whole["skipped"]) == (len(there), len(texts) - len(there))
    assert whole["tokens"] == sum(shard["tokens"] for shard in whole["shards"])
    assert whole["tokens"] == sum(1 + len(encode(text)) for text in there)


@pytest.mark.parametrize("shard", [10**6, 10**3, 300, len(EXPECTED) // 10, 50])
def test_a_tenth_validates_unless_that_is_more_than_a_shard(tmp_path, shard):
    total, output = len(EXPECTED), tmp_path / "out"
    val = min(total // 10, shard)
    manifest = prepare_shards(config(json_lines(tmp_path / "a.jsonl"), output, shard_tokens=shard, val_tokens=None))
    counts = {shard["file"]: shard["tokens"] for shard in manifest["shards"]}
    expected = {"s_val_000000.bin": val, "s_train_000000.bin": min(shard, total) - val}
    expected |= {f"s_train_{at // shard:06d}.bin": min(shard, total - at) for at in range(shard, total, shard)}
    assert counts == {name: tokens for name, tokens in expected.items() if tokens}
    assert {file.name for file in output.iterdir()} == {MANIFEST, *counts}
    tokens = [np.fromfile(output / name, "<u2", offset=HEADER) for name in counts]
    assert np.concatenate(tokens).tolist() == EXPECTED
    for about in manifest["shards"]:
        assert hashlib.sha256((output / about["file"]).read_bytes()).hexdigest() == about["sha256"]
    assert json.loads((output / MANIFEST).read_text()) == manifest
    assert manifest["settings"]["val_tokens"] is None
    train, validation, _ = read_shards(str(output), 0.9, gpt2_tokenizer())
    assert (validation[:].tolist(), train[:].tolist()) == (EXPECTED[:val], EXPECTED[val:])


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("ending", "val"), [(".jsonl", 50), (".jsonl", None), (".jsonl.gz", None), (".parquet", 50), (".txt", None)]
)
def test_cut_off_at_every_write_it_goes_on(tmp_path, monkeypatch, ending, val):
    """The n-th time anything is made durable the process is gone, and what it had not flushed is anyone's guess."""
    texts = [*TEXTS, None, "".join(TEXTS)]
    if ending == ".txt":
        sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for source in sources:
            source.write_bytes("\n".join(filter(None, texts)).encode())
    else:
        sources = [write(tmp_path / f"a{ending}", texts)]
    sizes = {"shard_tokens": 700, "val_tokens": val}
    prepare_shards(config(sources, tmp_path / "whole", **sizes))
    fsync, replace = os.fsync, Path.replace
    left = 0

    def counted(act):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return act(*arguments)

        return call

    monkeypatch.setattr(shard_writer.os, "fsync", counted(fsync))
    monkeypatch.setattr(shard_writer.Path, "replace", counted(replace))
    cuts, progress, dividing, closing = 0, [], set(), itertools.count(1)
    for moment in range(100):
        left = next(closing) if progress[-1:] == [[len(sources), 0, 0]] else 12 + moment % 7
        try:
            prepare_shards(config(sources, tmp_path / "cut", **sizes), chunk=400, save_every=0)
            break
        except Killed:
            cuts += 1
            for part in (tmp_path / "cut").glob("*.part"):
                with part.open("ab") as file:
                    file.write(b"rubbish")
            notes = json.loads((tmp_path / "cut" / MANIFEST).read_text())
            progress.append(notes.get("end", [9, 0, 0]))
            if list((tmp_path / "cut").glob("*.undivided")) and list((tmp_path / "cut").glob("*_val_*.bin")):
                dividing.add(notes["complete"])
    assert cuts > 5
    assert dividing == (set() if val else {False, True})
    assert progress == sorted(progress)
    assert made(tmp_path / "cut") == made(tmp_path / "whole")


def test_killed_for_real_and_recognized_when_finished(tmp_path):
    source = json_lines(tmp_path / "a.jsonl", [story_of(2000) + str(number) for number in range(400)])
    options = [f"source={source}", "name=s", "shard_tokens=300000", "val_tokens=1000"]
    run = [sys.executable, "-m", "src.prepare", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CONF.parent), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([*run, f"output={tmp_path / 'cut'}"], cwd=tmp_path, env=environment)
    while process.poll() is None and not list((tmp_path / "cut").glob("*_train_*.bin.part")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert json.loads((tmp_path / "cut" / MANIFEST).read_text())["complete"] is False
    for output in "cut", "whole":
        done = subprocess.run([*run, f"output={tmp_path / output}"], cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert made(tmp_path / "cut") == made(tmp_path / "whole")
    before = {file: (tmp_path / "cut" / file).stat().st_mtime_ns for file in made(tmp_path / "cut")}
    assert prepare_shards(config(source, tmp_path / "cut", shard_tokens=300000, val_tokens=1000))["complete"]
    assert before == {file: (tmp_path / "cut" / file).stat().st_mtime_ns for file in before}


def test_a_long_document_without_line_breaks_stays_small(tmp_path):
    """Of 20 MB, no chunk is larger than the piece of it that is tokenized."""
    source = tmp_path / "a.txt"
    source.write_text("word after word, " * 1_200_000)
    asked = config(source, tmp_path / "out")
    texts = prepare._Texts(asked, gpt2_tokenizer(), [source], tmp_path, lambda size: None, 2**16)
    chunks = list(merged(texts._chunks((0, 0, 0)), 2**16))
    assert max(sum(len(piece or "") for piece in chunk.pieces) for chunk in chunks) < 2**18
    assert sum(len(piece or "") for chunk in chunks for piece in chunk.pieces) == 17 * 1_200_000


def refused(asked: PrepareConfig) -> str:
    with pytest.raises(ValueError) as error:
        prepare_shards(asked)
    assert "\n" not in str(error.value)
    return str(error.value)


BROKEN = {  # name, content, a part of the message
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
    "no object": ("a.jsonl", b'["a"]', "line 1 is not a JSON object"),
    "no key": (
        "a.jsonl",
        b'{"content": "a", "id": 3}',
        "no key text (it has: content, id); use text_key=<one of these>",
    ),
    "no text": ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}', "line 3 has no text under text, but 5"),
    "nulls alone": ("a.jsonl", b'{"text": null}\n{"text": null}', "source holds no document (2 null); use source="),
    "one word without end": ("a.txt.gz", gzip.compress(b"a" * 2**23), "a.txt.gz has more than 5,000,000 characters"),
    "no UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8, see its byte 10"),
    "no UTF-8 in text": ("a.txt", b"abc\xff", "a.txt is not UTF-8, see byte 3"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "truncated gzip": (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 999)[:-9],
        "a.jsonl.gz is damaged or incomplete",
    ),
    "no gzip": ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz is damaged or incomplete (Not a gzipped file"),
    "damaged gzip": ("a.txt.gz", gzip.compress(bytes(range(128)) * 9)[:20] + b"\0" * 40, "damaged or incomplete"),
    "empty": ("a.txt", b"", "is empty"),
    "no document": ("a.jsonl", b"\n \n", "source holds no document"),
    "other format": ("a.csv", b"text", "a.csv is none of .txt, .jsonl, .parquet"),
    "packed parquet": ("a.parquet.gz", b"PAR1", "a.parquet.gz is compressed parquet; use source=<the file, unpacked>"),
    "too little": ("a.txt", b"a b c", "val_tokens=50 leaves nothing of the 4 tokens for training; use val_tokens=0"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_source_is_one_line(tmp_path, what):
    name, content, message = BROKEN[what]
    (tmp_path / name).write_bytes(content)
    assert message in refused(config(tmp_path / name, tmp_path / "out" / "deeper"))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_one_token_cannot_be_divided(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}')
    assert "holds only 1 token; use source=" in refused(config(tmp_path / "a.jsonl", tmp_path / "out", val_tokens=None))


def test_a_wrong_key_leaves_nothing_in_the_way_of_the_right_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "a b c d"}\n{"content": null}\n' * 9)
    for output in tmp_path / "new" / "out", tmp_path:
        assert "no key text (it has: content)" in refused(config(tmp_path / "a.jsonl", output / "x"))
        assert not (output / "x").exists()
    made = prepare_shards(config(tmp_path / "a.jsonl", tmp_path / "x", val_tokens=None, text_key="content"))
    assert (made["documents"], made["skipped"], made["tokens"]) == (9, 9, 45)
    assert not (tmp_path / "x" / ".lock").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures itself in Linux's /proc")
@pytest.mark.parametrize("name", ["line.jsonl.gz", "line.jsonl.zst", "zeros.txt.zst", "lines.jsonl.zst"])
def test_a_small_file_that_unfolds_to_a_gigabyte_takes_little_memory(tmp_path, name):
    begin, block, message = {
        "line": (b'{"text": "', b"a" * 2**24, "line 1 has more than 32 MiB; use source="),
        "zeros": (b"", bytes(2**24), "has more than 5,000,000 characters without a word boundary; use source="),
        "lines": (b"", b"\n" * 2**18, "source holds no document; use source="),
    }[name.split(".")[0]]
    if name.endswith(".gz"):
        packed = gzip.compress(begin) + gzip.compress(block) * 64
    else:
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.CompressedOutputStream(sink := pyarrow.BufferOutputStream(), "zstd") as stream:
            for part in [begin, *[block] * 64]:
                stream.write(part)
        packed = sink.getvalue().to_pybytes()
    (tmp_path / name).write_bytes(packed)
    assert len(packed) < 2**21
    code = (
        "import sys\n"
        "from src.data.config import PrepareConfig\n"
        "from src.data.prepare import prepare_shards\n"
        "try:\n"
        "    prepare_shards(PrepareConfig(source=sys.argv[1], output=sys.argv[2]))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / "out")],
        cwd=CONF.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    error, peak = done.stdout.splitlines()
    assert message in error
    assert int(peak) < 400


def test_broken_parquet_and_zstandard_are_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    whole = write(tmp_path / "a.parquet", TEXTS)
    assert "no column story (it has: id, text)" in refused(config(whole, tmp_path / "o1", text_key="story"))
    assert "row 1 has no text under id, but 1" in refused(config(whole, tmp_path / "o2", text_key="id"))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert prepare_shards(config(tmp_path / "null.parquet", tmp_path / "o3", val_tokens=None))["skipped"] == 1
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-9])
    assert "cut.parquet cannot be read as parquet" in refused(config(tmp_path / "cut.parquet", tmp_path / "o4"))
    packed = write(tmp_path / "a.jsonl.zst", TEXTS)
    packed.write_bytes(packed.read_bytes()[:-5])
    assert "cannot be read (Truncated compressed stream)" in refused(config(packed, tmp_path / "o5"))
    packed.write_bytes(b"no zstandard at all")
    assert "cannot be read (ZSTD decompress failed" in refused(config(packed, tmp_path / "o6"))


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert refused(config(tmp_path, tmp_path / "out")).endswith('need pyarrow; use pip install -e ".[data]"')


def test_other_text_other_settings_and_foreign_folders_are_refused(tmp_path):
    source, output = json_lines(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare_shards(config(source, output))
    before = made(output)
    assert refused(config(source, output, shard_tokens=99)).endswith("use shard_tokens=200, or output=<a new folder>")
    assert "val_tokens=7 is not what" in refused(config(source, output, val_tokens=7))
    assert "val_tokens=null is not what" in refused(config(source, output, val_tokens=None))
    assert prepare_shards(config(source, output, workers=3))["complete"]
    source.write_text(source.read_text().replace("ferry", "merry"))
    assert "a.jsonl is new or has changed" in refused(config(source, output))
    assert made(output) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    assert "holds something else (thesis.tex)" in refused(config(source, tmp_path / "foreign"))
    (tmp_path / "used").mkdir()
    with FileLock(tmp_path / "used" / ".lock"):
        assert "is in use by another process" in refused(config(source, tmp_path / "used"))


def test_full_disk_is_one_line_and_can_be_continued(tmp_path, monkeypatch):
    source, output = json_lines(tmp_path / "a.jsonl"), tmp_path / "out"
    with monkeypatch.context() as patch:
        write = shard_writer.ShardWriter._write

        def full(self, *arguments):
            if len(self.manifest["shards"]) == 2:
                raise OSError(28, "No space left on device")
            write(self, *arguments)

        patch.setattr(shard_writer.ShardWriter, "_write", full)
        assert "No space left on device" in refused(config(source, output))
    prepare_shards(config(source, output))
    assert tokens_in(output) == EXPECTED


def test_full_disk_at_the_very_end(tmp_path, monkeypatch):
    asked = config(json_lines(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=TokenizerConfig(name="byte"))
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "finish", raised := Mock(side_effect=OSError(28, "No space left")))
        assert "repeat the command, which continues" in refused(asked)
    assert raised.called
    prepare_shards(asked)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    with caplog.at_level("INFO"):
        for total in 1500, None:
            with progress.progress("tokenizing", total, "bytes") as advance:
                advance(1200)
                advance(300)
    done = [message.split(", ")[0].removesuffix(" bytes") for message in caplog.messages]
    assert done == ["tokenizing: 1,200", "tokenizing: 1,500"] * 2
    assert caplog.messages[1].endswith(" per second, 0 s left")


def test_command(command, tmp_path):
    source, output = json_lines(tmp_path / "a.jsonl"), tmp_path / "out"
    arguments = [f"source=[{source}]", f"output={output}", "shard_tokens=500", "val_tokens=100"]
    status, out, err = command("prepare", *arguments)
    assert status == 0, err
    assert out == f"{output}: 5 shards, {len(EXPECTED):,} tokens, 6 documents, {sum(map(len, TEXTS)):,} characters\n"
    assert "out_val_000000.bin  100 tokens" in err
    status, out, err = command("prepare", "source=nowhere", f"output={source}", "workers=0")
    assert (status, out) == (1, "")
    assert err.startswith("error: workers=0 must be at least 1")
    status, out, err = command("prepare", "source=nowhere", f"output={source}/x")
    assert err.count("error: ") == err.count("\n") == 2
    source.write_text('{"text": null}\n' + source.read_text())
    status, out, err = command("prepare", f"source={source}", f"output={output}2")
    assert status == 0, err
    assert out.endswith("6 documents, " + f"{sum(map(len, TEXTS)):,} characters, 1 skipped (text is null)\n")


def test_the_home_of_nobody(command, tmp_path):
    for arguments in ["source='~no one/a.txt'", "output=x"], [f"source={CONF}", "output='~no one/x'", "dry_run=false"]:
        status, _, err = command("prepare", *arguments)
        assert status == 1
        assert "Traceback" not in err and err.startswith("error: ")
