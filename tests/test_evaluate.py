"""``python -m src.evaluate``: every token of the split counts once, whatever the batch."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import metrics_of
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from src import evaluate
from src.cli.overrides import compose
from src.cli.text_of_run import with_data_of_run
from src.data.corpus import read_corpus
from src.data.tokens import split_tokens
from src.evaluation.losses import _batches, text_loss, unigram_loss
from src.interop.weights import save_weights
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.tokenizer import encode, gpt2_tokenizer, token_byte_counts


@pytest.fixture
def net():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=256, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.2))


def one_by_one(net: GPT, tokens: np.ndarray, length: int, stride: int) -> np.ndarray:
    """The loss of each token but the first, each computed from a window of its own: the first one that holds it."""
    net.eval()
    losses = []
    for target in range(1, len(tokens)):
        start = max(-(-(target - length) // stride), 0) * stride
        row = torch.from_numpy(tokens[start : target + 1].astype(np.int64))[None]
        with torch.no_grad():
            losses.append(F.cross_entropy(net(row[:, :-1])[0, -1:], row[0, -1:]).item())
    return np.array(losses)


@pytest.mark.parametrize("stride", [16, 5, 1])
@pytest.mark.parametrize("count", [2, 9, 16, 17, 18, 60])
def test_every_token_counts_once_whatever_the_batch(net, count, stride):
    tokens = np.random.default_rng(0).integers(256, size=count).astype(np.uint16)
    expected = one_by_one(net, tokens, 16, stride)
    byte_counts = np.arange(256)
    for batch_size in 1, 3, 64:
        net.train()
        found = text_loss(net, tokens, 16, stride, batch_size, byte_counts, surprises=5)
        assert net.training
        assert found.tokens == count - 1
        assert found.loss == pytest.approx(expected.mean(), abs=1e-6)
        assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-6)
        assert found.bytes == byte_counts[tokens[1:]].sum()
        worst = np.sort(expected)[::-1][:5]
        assert [one.loss for one in found.surprises] == pytest.approx(worst.tolist(), abs=1e-5)
        for one in found.surprises:
            assert one.token == tokens[one.at]
            assert one.loss == pytest.approx(expected[one.at - 1], abs=1e-5)


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_windows_cover_every_target_once(count, length, stride, batch_size):
    stride = min(stride, length)
    seen = []
    for starts, window, scored in _batches(count, length, stride, batch_size):
        assert len(starts) <= batch_size
        assert 0 < scored <= window <= length
        for start in starts:
            seen += range(start + window - scored + 1, start + window + 1)
    assert seen == list(range(1, count))


def test_loss_by_position(net):
    tokens = np.random.default_rng(0).integers(256, size=16 * 3 + 8).astype(np.uint16)
    found = text_loss(net, tokens, 16, batch_size=2)
    losses = one_by_one(net, tokens, 16, 16)
    whole, rest = losses[:48].reshape(3, 16), losses[48:]
    expected = [(whole[:, at].sum() + (rest[at] if at < 7 else 0)) / (4 if at < 7 else 3) for at in range(16)]
    assert found.by_position.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.counts.tolist() == np.bincount(tokens[1:], minlength=256).tolist()
    chosen = text_loss(net, tokens, 16, batch_size=2, starts=[0, 7, 32])
    losses = [one_by_one(net, tokens[start : start + 17], 16, 16) for start in (0, 7, 32)]
    assert chosen.loss == pytest.approx(np.mean(losses), abs=1e-6)
    assert chosen.tokens == 48
    strided = text_loss(net, tokens[:33], 16, stride=4)
    assert np.isfinite(strided.by_position).all()


def test_uniform_and_unigram_baselines():
    silent = GPT(GPTConfig(vocab_size=50, context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    torch.nn.init.zeros_(silent.head.weight)
    tokens = np.array([1, 2, 2, 3, 2, 1], dtype=np.uint16)
    assert text_loss(silent, tokens, 8).loss == pytest.approx(math.log(50), abs=1e-6)
    counts = np.bincount(tokens, minlength=50) + 1
    expected = -np.mean([math.log(counts[token] / counts.sum()) for token in tokens[1:]])
    assert unigram_loss(np.bincount(tokens[1:], minlength=50), tokens) == pytest.approx(expected)


def test_bits_per_byte_do_not_depend_on_the_tokens():
    silent = GPT(GPTConfig(context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    torch.nn.init.zeros_(silent.head.weight)
    tokens = encode("x the river did not say<|endoftext|>and so")
    found = text_loss(silent, tokens, 8, byte_counts=token_byte_counts())
    bits = math.log2(50257) * (len(tokens) - 1)
    assert found.bits_per_byte == pytest.approx(bits / len(" the river did not sayand so"))


@pytest.fixture
def run(small_weights, text, tmp_path):
    def evaluated(*overrides: str, weights=small_weights) -> dict:
        cfg = compose("evaluate", [f"weights={weights}", f"data.path={text}", *overrides])
        return evaluate.evaluate(cfg, tmp_path)

    return evaluated


RUNS = {
    "plain": (),
    "bounded": ("eval.max_tokens=64", "data.stride=5"),
    "as in the book": ("eval.batches=1", "data.batch_size=3"),
    "bfloat16": ("trainer.precision=bf16-mixed", "eval.max_tokens=64"),
    "shorter windows": ("model.context_length=32", "data.context_length=16", "data.train_ratio=0.7"),
    "another spelling": ("data.special_tokens=text", "data.stride=7"),
}


@pytest.mark.parametrize("setting", RUNS)
def test_a_runs_checkpoint_has_the_runs_own_losses(tiny_run, command, long_text, tmp_path, monkeypatch, setting):
    """Without a word about data; at any evaluated step, not at the last alone."""
    text = long_text
    text.write_text(text.read_text() + "<|endoftext|> said the ferry" * 20)
    trained = tiny_run(
        "trainer.max_steps=9", "eval.every_steps=3", "callbacks=none", "optimizer.learning_rate=0.1", *RUNS[setting],
        "tokenizer=gpt2", f"data.path={text}", folder=tmp_path / "outputs" / "gpt2" / "one",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows = {row["step"]: row for row in metrics_of(trained) if "val/loss" in row}
    assert rows[9]["val/loss"] != min(row["val/loss"] for row in rows.values())
    for name in "last", "best":
        step = torch.load(trained.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        weights = "latest" if name == "best" else f"outputs/gpt2/one/checkpoints/{name}.ckpt"
        for split, key in ("val", "val/loss"), ("train", "train/eval_loss"):
            out = tmp_path / f"{name}_{split}"
            status, said, err = command("evaluate", f"weights={weights}", f"split={split}", f"hydra.run.dir={out}")
            assert status == 0, err
            found = json.loads((out / "evaluation.json").read_text())
            assert found["loss"] == pytest.approx(rows[step][key], abs=1e-4)
            assert found["precision"] == trained.record["precision"]
            assert found["tokens"] == 16 * len(trained.datamodule.evaluated_windows()[split == "train"])
            assert found["data_sha256"] == trained.record["data_sha256"]
            assert found["text"] == str(text)
            for line in f"text {text}", f"split {split}", "windows of 16 tokens, those of the run's own evaluations":
                assert line in " ".join(said.split())


def test_other_windows_of_a_run_than_its_own(tiny_run, run, tmp_path):
    trained = tiny_run("trainer.max_steps=2", "callbacks=none", "eval.max_tokens=64")
    tokens = len(trained.datamodule.val_windows.tokens)
    every = run("max_tokens=-1", weights=trained.folder)
    assert every["tokens"] == tokens - 1
    assert every["scored"] == "every token but the first, once, with up to 16 tokens of context"
    assert run("stride=4", weights=trained.folder)["tokens"] == tokens - 1
    few = run("max_tokens=40", weights=trained.folder)
    assert (few["tokens"], few["scored"].split(",")[1]) == (32, " spread over the split")
    assert run("data.train_ratio=0.8", weights=trained.folder)["scored"].startswith("every token")


def test_a_run_whose_text_changed_or_went(tiny_run, command, text, tmp_path, monkeypatch):
    trained = tiny_run("trainer.max_steps=2", "callbacks=none", "data.train_ratio=0.7", f"data.path={text}")
    common = (f"weights={trained.folder}", f"hydra.run.dir={tmp_path / 'out'}", "surprises=0")
    text.rename(tmp_path / "moved.txt")
    status, _, err = command("evaluate", *common)
    assert (status, err.count("\n")) == (1, 1)
    assert f"error: data.path={text}, which weights={trained.folder} was trained on, does not exist" in err
    assert err.endswith("; use data.path=<where it is now>, or data=<another text>\n")
    status, _, err = command("evaluate", *common, f"data.path={tmp_path / 'moved.txt'}")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(trained.record["val_loss"], abs=1e-4)  # the cut is the run's all the same
    text.write_text("So said the ferry, " * 300)
    _, out, _ = command("evaluate", *common[:1], f"hydra.run.dir={tmp_path / 'changed'}")
    assert "is no longer the text that the weights were trained on" in out
    assert "every token but the first" in out
    found = json.loads((tmp_path / "changed" / "evaluation.json").read_text())
    assert found["config"]["data"]["train_ratio"] == 0.7


def test_weights_of_no_run_or_of_several_ask_for_a_text(tiny_run, command, small_weights, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = (tiny_run("trainer.max_steps=1", "callbacks=none", f"data.train_ratio={share}").folder
                  for share in (0.9, 0.8))  # fmt: skip
    lone = shutil.copy(one / "checkpoints" / "last.ckpt", tmp_path / "lone.ckpt")
    for asked in [f"weights={small_weights}"], ["-m", f"weights={one},{other}"]:
        status, _, err = command("evaluate", *asked)
        assert (status, err.count("\n")) == (1, 1)
        assert err.endswith("; use data=story, or data=text data.path=<a text>\n")
    assert list(tmp_path.glob("outputs")) == []
    assert f"++data.path='{text}'" in with_data_of_run([f"weights={lone}"])
    assert with_data_of_run([f"weights={lone}", "data=story"]) == [f"weights={lone}", "data=story"]
    again = shutil.copytree(one, tmp_path / "again")
    both = ["-m", f"weights={one},{again}"]
    assert with_data_of_run(both) == ["-m", f"++data.path='{text}'", both[1]]
    both = [f"weights={other}", "--cfg", "job"]
    assert with_data_of_run(both) == [f"++data.path='{text}'", "++data.train_ratio=0.8", *both]
    named = one.rename(tmp_path / "my,run")
    assert with_data_of_run([f"weights={named}"])[0] == f"++data.path='{text}'"


def test_what_names_the_text_comes_from_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").touch()
    data = {"path": "deep/**/*.txt", "train_shards": 3, "seed": 7, "stride": 2}
    (tmp_path / "run.json").write_text(json.dumps({"overrides": [], "config": {"data": data}}))
    weights = f"weights={tmp_path}"
    assert with_data_of_run([weights]) == ["++data.path='deep/**/*.txt'", "++data.train_shards=3", weights]


def test_a_loss_that_is_no_number(command, small_net, text, tmp_path):
    net = copy.deepcopy(small_net)
    net.head.weight.data.fill_(1e38)
    save_weights(net, tmp_path / "huge.pt")
    status, out, _ = command(
        "evaluate", f"weights={tmp_path / 'huge.pt'}", f"data.path={text}", f"hydra.run.dir={tmp_path / 'out'}"
    )
    assert status == 1
    assert "have a loss of nan; use weights=<another checkpoint>" in out or "have a loss of inf; use weights=<" in out
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_the_same_for_batch_sizes_1_3_and_64(run):
    found = [run(f"data.batch_size={size}", "surprises=0") for size in (1, 3, 64)]
    for key in "loss", "perplexity", "bits_per_byte":
        assert [one[key] for one in found] == pytest.approx([found[0][key]] * 3, rel=1e-6)


def test_splits(run, text):
    tokens = {split: run(f"split={split}")["tokens"] for split in ("train", "val", "all")}
    train, val = split_tokens(read_corpus(str(text)), 0.9, gpt2_tokenizer())
    assert tokens == {"train": len(train) - 1, "val": len(val) - 1, "all": len(encode(text.read_text())) - 1}


def test_what_it_leaves(run, tmp_path):
    found = run("surprises=7")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert found["uniform_loss"] == pytest.approx(math.log(50257))
    assert 2 < found["unigram_loss"] < found["uniform_loss"]
    assert len(found["loss_by_position"]) == 32
    rows = (tmp_path / "surprises.md").read_text().splitlines()
    assert len(rows) == 2 + 7
    losses = [float(row.split("|")[1]) for row in rows[2:]]
    assert losses == sorted(losses, reverse=True)
    from matplotlib.image import imread

    for name in "loss_by_position", "surprises":
        image = imread(tmp_path / "plots" / f"{name}.png")
        assert image.std() > 0.02


def test_several_weights_give_one_table(command, small_weights, tiny_run, text, tmp_path, monkeypatch):
    trained = tiny_run("trainer.max_steps=1", "callbacks=none")
    monkeypatch.chdir(tmp_path)
    status, out, err = command(
        "evaluate", "-m", f"weights={small_weights},{trained.folder}", f"data.path={text}", "surprises=0"
    )
    assert status == 0, err
    table = out[out.index("      loss  perplexity   bits/byte") :].splitlines()
    assert [row.split()[4] for row in table[1:3]] == ["1", "0"]  # the lower loss first
    losses = [json.loads(file.read_text())["loss"] for file in sorted(tmp_path.glob("outputs/*/*/*/evaluation.json"))]
    assert [float(row.split()[0]) for row in table[1:3]] == pytest.approx(sorted(losses), rel=1e-4)


BAD = {
    "weights=nowhere": "none of gpt2",
    "weights=W split=test": "split=val",
    "weights=W stride=0": "stride=null",
    "weights=W stride=33": "stride=32",
    "weights=W context_length=64": "context_length=32",
    "weights=W data.path=nowhere": "data.path=nowhere does not exist",
    "weights=W context_length=64 data.context_length=16": "use context_length=16",
    "weights=W tasks=hellaswag": 'use \'tasks=["lambada_openai","hellaswag"]\'',
    "weights=W tasks_path=nowhere": "use tasks_path=<a folder of task files>",
    "weights=W tasks_limit=0": "use tasks_limit=null",
    "weights=null": "weights=gpt2",
    "weights=W data.stride=4": "stride=4",
    "weights=W stride=64 context_length=16": "stride=16",
    "weights=W surprises=-1": "surprises=20",
    "weights=W device=quantum": "device=auto",
    "weights=W data.batch_size=0": "data.batch_size=2",
    "weights=W splt=val": "split",
    "weights=W max_tokens=0": "max_tokens=-1",
    "weights=W max_tokens=32 stride=4": "max_tokens=-1",
    "weights=W precision=fp8": "precision=null",
    "weights=S": "has 61 tokens",
}


@pytest.mark.parametrize("arguments", BAD)
def test_mistakes_are_one_line_with_their_cure(command, small_weights, text, tmp_path, arguments):
    cure = BAD[arguments]
    small = GPT(GPTConfig(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=2))
    save_weights(small, tmp_path / "small.pt")
    for letter, file in ("W", small_weights), ("S", tmp_path / "small.pt"):
        arguments = arguments.replace(f"={letter}", f"={file}")
    given = [f"data.path={text}"] if "data.path" not in arguments else []
    status, out, err = command("evaluate", *arguments.split(), *given, f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 1
    said = [line for line in (out + err).splitlines() if "error: " in line]
    assert len(said) == 1, out + err
    assert cure in said[0]
    assert "Traceback" not in out + err
