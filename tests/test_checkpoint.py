"""A checkpoint is the old one or the new one, is what was written, and executes nothing."""

import builtins
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.checkpoint.find import good_checkpoint, newest_good_checkpoint, read_checkpoint
from src.checkpoint.plugin import SealedCheckpointIO
from src.checkpoint.seal import SealedWriter
from src.checkpoint.storage import DamagedError, write_sealed
from src.cli.overrides import CONF
from src.interop.weights import load_weights, read_weights, save_weights
from src.model.config import GPTConfig
from src.model.gpt import GPT


def content_of(step: int, size: int = 100) -> dict:
    """As small as a checkpoint can be; its weights tell its step."""
    return {
        "global_step": step,
        "hyper_parameters": {"model": {}},
        "state_dict": {"weight": torch.full((size,), float(step))},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(size)}}}],
    }


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), plain), st.lists(st.integers(0, 50), max_size=3))
def test_what_is_read_is_what_was_written(tmp_path_factory, extra, shape):
    path = tmp_path_factory.mktemp("checkpoints") / "any.ckpt"
    written = {**content_of(1), "extra": extra, "tensor": torch.arange(int(torch.tensor(shape).prod())).reshape(shape)}
    write_sealed(written, path)
    read = read_checkpoint(path)
    assert read["extra"] == extra
    assert torch.equal(read["tensor"], written["tensor"])
    assert list(path.parent.iterdir()) == [path]


def test_flipped_bit_or_truncation_is_found_and_an_older_one_taken(tmp_path, trials, caplog):
    save = SealedCheckpointIO().save_checkpoint
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    save(content_of(1), last)
    save(content_of(2), last)
    good = last.read_bytes()
    draw = random.Random(1)
    flips = [draw.randrange(8 * len(good)) for _ in range(trials(30, 300))]
    lengths = [draw.randrange(len(good)) for _ in range(trials(10, 100))]
    flips += [8 * (len(good) - 1 - byte) + bit for byte in (0, 63, 64, 70, 71, 72) for bit in range(8)]  # of the seal
    for bit in flips:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        last.write_bytes(bad)
        for read in read_checkpoint, read_weights:
            with pytest.raises(ValueError, match=r"damaged"):
                read(last)
        path, content = newest_good_checkpoint(tmp_path)
        assert (path, content["global_step"]) == (previous, 1)
    for length in lengths:
        last.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"damaged"):
            read_checkpoint(last)
        assert newest_good_checkpoint(tmp_path)[0] == previous
    assert "last.ckpt is damaged, its content does not match its SHA-256, looking for an older one" in caplog.text
    trials.passed("one flipped bit in a checkpoint", len(flips), "found before use, an older one taken")
    trials.passed("a truncated checkpoint", len(lengths), "found before use, an older one taken")


def test_a_damaged_file_that_was_asked_for(tmp_path):
    write_sealed(content_of(1), tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-100])
    with pytest.raises(DamagedError, match="damaged"):
        good_checkpoint(tmp_path / "last.ckpt")
    write_sealed(content_of(2), tmp_path / "best.ckpt")
    assert good_checkpoint(tmp_path / "last.ckpt")[0] == tmp_path / "best.ckpt"
    with pytest.raises(ValueError, match=r"weights=.* is damaged"):  # other weights would be another model
        read_weights(tmp_path / "last.ckpt")


SAVER = """
import sys, torch
from pathlib import Path
from src.checkpoint.plugin import SealedCheckpointIO
weight = torch.zeros(4_000_000)
print("ready", flush=True)
for step in range(10**6):
    SealedCheckpointIO().save_checkpoint({
        "global_step": step, "hyper_parameters": {}, "state_dict": {"weight": weight.fill_(step)},
        "optimizer_states": [{"state": {}, "param_groups": []}]}, Path(sys.argv[1], "last.ckpt"))
"""


def test_killed_while_saving(tmp_path, trials):
    """SIGKILL at any moment, with the temporary folder on another file system: there is a good file, and no other."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system")
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent), "TMPDIR": str(elsewhere)}
    draw = random.Random(2)
    last = tmp_path / "last.ckpt"
    count = trials(1, 20)
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, cwd=tmp_path
        )
        process.stdout.readline()
        while not last.exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = read_checkpoint(last)
        assert torch.equal(content["state_dict"]["weight"], torch.full((4_000_000,), float(content["global_step"])))
    trials.passed("killed during a save, the temporary folder on another file system", count, "load the old or the new")


def test_disk_full(tmp_path, monkeypatch):
    """The old file stays, nothing else is left, and the message says how much is missing."""
    path = tmp_path / "last.ckpt"
    write_sealed(content_of(1), path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(OSError, match=r"disk is full\): it takes 0\.00 GB and 0\.00 GB are free; free some") as error:
        write_sealed(content_of(2), path, previous=tmp_path / "previous.ckpt")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]
    assert read_checkpoint(path)["global_step"] == 1


def test_disk_that_fails_while_writing(tmp_path):
    """A real limit of the system on the size of a file, in a process of its own."""
    write_sealed(content_of(1), tmp_path / "last.ckpt")
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from src.checkpoint.storage import write_sealed\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "content = {'state_dict': {'weight': torch.zeros(10**6)}}\n"
        "try: write_sealed(content, Path(sys.argv[1], 'last.ckpt'), Path(sys.argv[1], 'previous.ckpt'))\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=CONF.parent, capture_output=True, text=True, timeout=120
    )
    assert "could not be written" in done.stdout
    assert "0.00 GB and" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["weight", "moment"])
def test_no_file_ever_holds_what_is_no_number(tmp_path, value, place):
    path = tmp_path / "last.ckpt"
    write_sealed(content_of(1), path)
    bad = content_of(2)
    (bad["state_dict"]["weight"] if place == "weight" else bad["optimizer_states"][0]["state"][0]["exp_avg"])[50] = (
        value
    )
    with pytest.raises(ValueError, match="was not written because the weights or the optimizer state are not finite"):
        write_sealed(bad, path)
    assert read_checkpoint(path)["global_step"] == 1


class Wants:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(executed: Path) -> dict[str, tuple[object, str]]:
    write = f"open({str(executed)!r}, 'w')"
    return {
        "system": (Wants(os.system, f"touch {executed}"), "system"),
        "eval": (Wants(builtins.eval, write), "eval"),
        "exec": (Wants(builtins.exec, write), "exec"),
        "subprocess": (Wants(subprocess.Popen, ["touch", str(executed)]), "Popen"),
        "getattr": (Wants(builtins.getattr, Path, "touch"), "getattr"),
        "remove": (Wants(shutil.rmtree, str(executed.parent / "precious")), "rmtree"),
    }


@pytest.mark.parametrize("name", evil(Path("x")))
@pytest.mark.parametrize("form", ["zip", "sealed", "legacy", "pickle"])
def test_a_pickle_that_wants_code_is_refused_and_named(tmp_path, name, form, trials):
    executed, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    (tmp_path / "precious").mkdir()
    wanted, function = evil(executed)[name]
    content = {**content_of(1), "callbacks": wanted}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": wanted}))
    elif form == "sealed":
        with SealedWriter(path) as file:
            torch.save(content, file)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    for read in read_checkpoint, read_weights, load_weights, good_checkpoint:
        with pytest.raises(ValueError, match=rf"refused, it would execute \S*{function}") as error:
            read(path)
        assert "\n" not in str(error.value)
    assert not executed.exists()
    assert (tmp_path / "precious").exists()
    if form == "sealed":
        trials.passed("malicious checkpoints", 1, "refused, 0 executed")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + b"0" * 200, b"PK\x03\x04" + b"0" * 200, b"\x80\x02."])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged") as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is not a file or folder"):
        read_weights(tmp_path / "nothing.ckpt")


def test_weights_alone_are_sealed_too(tmp_path):
    net = GPT(GPTConfig(vocab_size=50, context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    path = tmp_path / "weights.pt"
    save_weights(net, path)
    assert torch.equal(load_weights(path).tok_emb.weight, net.tok_emb.weight)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedError, match="does not match its SHA-256"):
        load_weights(path)


def test_a_checkpoint_of_another_trainer_gives_its_weights(tmp_path, caplog):
    """Of one that writes no SHA-256, as Lightning's own; but only a whole one can be continued from."""
    net = GPT(GPTConfig(vocab_size=50, context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    content = {
        **content_of(7),
        "hyper_parameters": {"model": net.config.model_dump(), "seed": 1},
        "state_dict": {f"net.{name}": tensor for name, tensor in net.state_dict().items()},
    }
    path = tmp_path / "version_0" / "checkpoints" / "epoch=0-step=7.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    for weights in path, path.parent, path.parents[1]:
        caplog.clear()
        assert torch.equal(load_weights(weights).tok_emb.weight, net.tok_emb.weight)
        assert caplog.messages[0] == f"{path} has no SHA-256, so damage to it would go unnoticed"
    with pytest.raises(DamagedError, match="it has no SHA-256"):
        read_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"it does not end where torch\.save ends"):
        read_weights(path)


def test_a_pipe_or_a_device_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    for path in tmp_path / "pipe.ckpt", Path("/dev/zero"):
        with pytest.raises(DamagedError, match="not a regular file"):
            read_checkpoint(path)


def test_the_name_of_a_file_reaches_the_terminal_in_one_printable_line(tmp_path, caplog):
    path = tmp_path / "\x1b[31m\nerror: evil.ckpt"
    path.write_bytes(b"hello" * 100)
    for read in read_checkpoint, read_weights:
        with pytest.raises(DamagedError) as error:
            read(path)
        assert str(error.value).isprintable()
    assert newest_good_checkpoint(tmp_path) is None
    assert all(message.isprintable() for message in caplog.messages)


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    for step in 1, 2:
        SealedCheckpointIO().save_checkpoint(content_of(step), tmp_path / "last.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 1
