"""Shards train as they are: their windows are those of the tokens end to end, and what is no whole shard is refused."""

import json
import signal
import threading

import numpy as np
import pytest
from conftest import FAST, story_of
from hypothesis import given
from hypothesis import strategies as st
from interrupting import first_difference

from src.checkpoint.interruption import Interrupted
from src.data import shard_check, shards
from src.data.config import PrepareConfig
from src.data.datamodule import TextDataModule
from src.data.manifest import MANIFEST
from src.data.prepare import prepare_shards
from src.data.shard_check import ShardCheck
from src.data.shards import ShardTokens, header, read_shards
from src.data.windows import SlidingWindowDataset
from src.tokenizer import gpt2_tokenizer


def shard(path, tokens) -> int:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes())
    return len(tokens)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 15), st.data())
def test_windows_cross_borders_unseen(tmp_path_factory, lengths, context_length, stride, data):
    folder = tmp_path_factory.mktemp("shards")
    whole = np.arange(sum(lengths), dtype=np.uint16)
    ends = np.cumsum(lengths)
    counts = [
        (folder / f"{i}.bin", shard(folder / f"{i}.bin", part)) for i, part in enumerate(np.split(whole, ends[:-1]))
    ]
    first = data.draw(st.integers(0, len(whole)))
    last = data.draw(st.integers(first, len(whole)))
    tokens, expected = ShardTokens(counts, 50257, first, last), whole[first:last]
    windows, plain = (SlidingWindowDataset(each, context_length, stride) for each in (tokens, expected))
    assert [(a.tolist(), b.tolist()) for a, b in windows] == [(a.tolist(), b.tolist()) for a, b in plain]
    assert tokens[:].tolist() == expected.tolist()
    assert tokens[len(tokens) + 3 :].tolist() == []


NAMES = {
    "fineweb_val_000000.bin fineweb_train_000001.bin fineweb_train_000002.bin": [2],
    "TinyStories_train.bin TinyStories_val.bin": [1],
    "val_set_train_000001.bin val_set_val_000000.bin": [1],
    "interval_000001.bin valley.bin": [],
}


@pytest.mark.parametrize("names", NAMES)
def test_others_shards_train_and_validate_by_their_names(tmp_path, names):
    files = sorted(names.split())
    lengths = [shard(tmp_path / name, np.full(10 + number, number)) for number, name in enumerate(files)]
    train, val, sha256 = read_shards(str(tmp_path), 0.75, gpt2_tokenizer())
    whole = np.repeat(np.arange(len(files)), lengths)
    cut = int(0.75 * len(whole))
    validates = np.isin(whole, NAMES[names]) if NAMES[names] else np.arange(len(whole)) >= cut
    assert train[:].tolist() == whole[~validates].tolist()
    assert val[:].tolist() == whole[validates].tolist()
    everything, nothing, again = read_shards(str(tmp_path / "*.bin"), 1.0, gpt2_tokenizer())
    assert (everything[:].tolist(), len(nothing), again) == (whole.tolist(), 0, sha256)


BROKEN = {
    "a byte short": (lambda whole: whole[:-1], "has 40 tokens by its header and 39.5 by its size"),
    "a token too many": (lambda whole: whole + b"ab", "has 40 tokens by its header and 41.0 by its size"),
    "count beyond the file": (lambda whole: header(10**9) + whole[1024:], "has 1,000,000,000 tokens by its header"),
    "negative count": (lambda whole: header(-3) + whole[1024:], "has -3 tokens by its header"),
    "no token": (lambda whole: header(0), "has 0 tokens by its header"),
    "another magic": (lambda whole: b"abcd" + whole[4:], "begins with 1684234849, 1, not with 20240520, 1"),
    "another version": (lambda whole: whole[:4] + b"\7" + whole[5:], "begins with 20240520, 7"),
    "no header": (lambda whole: whole[:1000], "has 1000 bytes, less than a header of 1024"),
    "empty": (lambda whole: b"", "has 0 bytes"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_shard_is_one_line(tmp_path, what):
    change, message = BROKEN[what]
    for number in range(2):
        shard(tmp_path / f"{number}.bin", range(40))
    (tmp_path / "1.bin").write_bytes(change((tmp_path / "1.bin").read_bytes()))
    with pytest.raises(ValueError) as error:
        read_shards(str(tmp_path), 0.9, gpt2_tokenizer())
    assert str(error.value).startswith(f"data.path: {tmp_path / '1.bin'} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ids_beyond_the_tokenizer_are_found_where_they_stand(tmp_path):
    shard(tmp_path / "0.bin", range(40))
    shard(tmp_path / "1.bin", [5, 50256, 50257, 60000])
    tokens, _, _ = read_shards(str(tmp_path), 1.0, gpt2_tokenizer())
    assert tokens[30:42].tolist() == [*range(30, 40), 5, 50256]
    with pytest.raises(ValueError, match=r"data\.path: token 2 of .*1\.bin is 50257, the tokenizer has only 50,257"):
        tokens[30:44]


def test_shards_of_other_roles_or_unfinished_or_foreign_are_refused(tmp_path):
    def refused(message: str, path=tmp_path) -> None:
        with pytest.raises(ValueError, match=message):
            read_shards(str(path), 0.9, gpt2_tokenizer())

    refused("is a folder without a .bin file")
    shard(tmp_path / "a_val_0.bin", range(9))
    refused("has no training shard, only a_val_0.bin")
    shard(tmp_path / "a_train_1.bin", range(9))
    (tmp_path / MANIFEST).write_text(json.dumps({"complete": False, "tokenizer": "?", "shards": []}))
    refused("are not complete; repeat the command that makes them, python -m src.prepare")
    (tmp_path / MANIFEST).write_text(json.dumps({"complete": True, "tokenizer": "?", "shards": []}))
    refused("comes from another tokenizer")
    (tmp_path / MANIFEST).write_text("{}")  # another program's
    read_shards(str(tmp_path), 0.9, gpt2_tokenizer())


def test_hash_tells_shards_from_others(tmp_path):
    def digest() -> str:
        return read_shards(str(tmp_path), 0.9, gpt2_tokenizer())[2]

    for name in "x_val_0.bin", "x_train_1.bin", "x_train_2.bin":
        shard(tmp_path / name, range(20_000))
    seen = [digest(), digest()]
    assert seen[0] == seen[1]
    shard(tmp_path / "x_train_1.bin", [1, *range(1, 20_000)])
    seen.append(digest())
    shard(tmp_path / "x_train_1.bin", range(20_001))
    seen.append(digest())
    (tmp_path / "x_val_0.bin").rename(tmp_path / "x_train_0.bin")
    seen.append(digest())
    about = {"complete": True, "tokenizer": shards.fingerprint(gpt2_tokenizer())}
    about["shards"] = [{"file": "x_train_2.bin", "sha256": "0"}]
    (tmp_path / MANIFEST).write_text(json.dumps(about))  # in the middle of which a token may differ
    seen.append(digest())
    assert len(set(seen)) == 5


@pytest.fixture
def prepared(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number} {story_of(170 + number)}")
    source, output = str(tmp_path / "*.txt"), tmp_path / "prepared"
    prepare_shards(PrepareConfig(source=source, output=str(output), shard_tokens=300, val_tokens=150))
    return tmp_path / "prepared"


def test_a_run_on_shards_resumes_to_the_same_bits(tiny_run, at_batch, prepared):
    common = ("data=shards", f"data.path={prepared}", "data.batch_size=8", "trainer.max_epochs=2", "callbacks=none")
    common += ("eval.batches=1", "tokenizer=gpt2")
    whole = tiny_run(*common)
    at_batch(9, lambda module: signal.raise_signal(signal.SIGTERM))
    folder = whole.folder.with_name("cut")
    with pytest.raises(Interrupted):
        tiny_run(*common, folder=folder)
    tiny_run(*common, resume=folder)
    assert first_difference(whole.folder, folder) is None
    shard(prepared / "prepared_train_000002.bin", range(300))
    with pytest.raises(ValueError, match=r"^data\.path=.* has another text than .* was trained on \(data_sha256"):
        tiny_run(*common, resume=folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache."""
    import pooch

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def overwrite_the_middle(file) -> None:
    with file.open("r+b") as stream:
        stream.seek(1024 + 200)
        stream.write(b"\7\0" * 50)


@pytest.mark.parametrize("found", ["at once", "at the end"])
def test_a_damaged_shard_stops_the_run(tiny_run, tmp_path, monkeypatch, prepared, cache, found):
    run = ("data=shards", f"data.path={prepared}", "trainer.max_steps=3", "callbacks=none", "tokenizer=gpt2")
    overwrite_the_middle(prepared / "prepared_train_000002.bin")
    start, verify, finish = ShardCheck.start, shard_check._verify, ShardCheck.finish
    ending = threading.Event()
    if found == "at once":
        monkeypatch.setattr(ShardCheck, "start", lambda self: (start(self), self._thread.join()))
    else:
        monkeypatch.setattr(shard_check, "_verify", lambda *arguments: (ending.wait(60), verify(*arguments)))
        monkeypatch.setattr(ShardCheck, "finish", lambda self: (ending.set(), finish(self)))
    with pytest.raises(ValueError, match=r"^data\.path: .*train_000002\.bin is damaged, .* data\.path=") as error:
        tiny_run(*run, folder=tmp_path / "run")
    assert "\n" not in str(error.value)
    if found == "at once":  # and nothing was trained
        assert not (tmp_path / "run").exists()
    else:
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert (record["status"], record["optimizer_steps"]) == ("failed", 3)


def test_a_shard_is_verified_once_and_after_each_change(monkeypatch, prepared, cache):
    read = []
    update = shard_check._remember
    monkeypatch.setattr(shard_check, "_remember", lambda path, state: (read.append(path), update(path, state)))

    def verified() -> list[str]:
        read.clear()
        check = ShardCheck([*prepared.glob("*.bin")] * 2)
        check.start()
        check.finish()
        return sorted(read)

    files = sorted(str(file.resolve()) for file in prepared.glob("*.bin"))
    assert verified() == files
    assert verified() == []
    (prepared / "prepared_train_000001.bin").write_bytes((prepared / "prepared_train_000001.bin").read_bytes())
    assert verified() == [files[0]]
    (record,) = (cache / "gpt2-lightning").iterdir()
    record.write_text("[1")
    assert verified() == files
    overwrite_the_middle(prepared / "prepared_train_000001.bin")
    with pytest.raises(ValueError, match=r"train_000001\.bin is damaged"):
        verified()
    (prepared / "prepared_train_000001.bin").unlink()
    check = ShardCheck([prepared / "prepared_train_000001.bin"])
    check.start()
    with pytest.raises(ValueError, match=r"cannot read .*train_000001\.bin \(No such file"):
        check.finish()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_foreign_id_stops_a_run_in_one_line(tiny_run, tmp_path, num_workers):
    shard(tmp_path / "x_train_1.bin", [50300] * 600)
    shard(tmp_path / "x_val_0.bin", range(100))
    with pytest.raises(ValueError, match=r"^data\.path: token \d+ of .* is 50300, the tokenizer has only") as error:
        tiny_run("data=shards", f"data.path={tmp_path}", f"data.num_workers={num_workers}", "tokenizer=gpt2", *FAST)
    assert "\n" not in str(error.value)


def test_evaluate_reads_shards(command, prepared, small_weights, tmp_path):
    shared = [f"weights={small_weights}", "data=shards", f"data.path={prepared}"]
    losses = {}
    for split in "val", "train", "all":
        folder = tmp_path / split
        status, _, err = command("evaluate", *shared, f"split={split}", f"hydra.run.dir={folder}")
        assert status == 0, err
        losses[split] = json.loads((folder / "evaluation.json").read_text())["tokens"]
    counts = [shard["tokens"] for shard in json.loads((prepared / MANIFEST).read_text())["shards"]]
    assert losses == {"val": counts[0] - 1, "train": sum(counts[1:]) - 1, "all": sum(counts) - 1}


def test_twenty_gigabytes_cost_nothing_beforehand(tmp_path, monkeypatch):
    """Sparse files: what is never read is never there."""
    files = [tmp_path / f"x_train_{number:06d}.bin" for number in range(20)]
    for path in files:
        with path.open("wb") as file:
            file.write(header(5 * 10**8))
            file.truncate(1024 + 10**9)
    about = {"complete": True, "tokenizer": shards.fingerprint(gpt2_tokenizer())}
    about["shards"] = [{"file": path.name, "sha256": "of other tokens"} for path in files]
    (tmp_path / MANIFEST).write_text(json.dumps(about))
    verified, read = [], threading.Event()
    monkeypatch.setattr(shard_check, "_verify", lambda file, _: read.wait(60) and verified.append(file))
    data = TextDataModule(format="shards", path=str(tmp_path), context_length=1024, batch_size=8)
    data.setup()
    inputs, _ = next(iter(data.train_dataloader()))
    assert inputs.shape == (8, 1024)
    assert len(data.train_windows.tokens) == 9 * 10**9
    assert len(set(data.token_offsets(3, 10**6))) == 8
    assert verified == []
    read.set()
    data.teardown("fit")
    assert verified == files
