"""``python -m src.export``: other tools take it from there."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import metrics_of

from src.cli.overrides import CONF
from src.generation.decode import generate
from src.interop.weights import load_weights, save_weights
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.tokenizer import encode, text_to_token_ids

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

FILES = {
    "huggingface": {"README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
                    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"},
    "book": {"model.json", "model.pth"},
    "weights": {"weights.pt"},
}  # fmt: skip


@pytest.mark.parametrize("form", FILES)
def test_each_format_is_the_same_model(command, small_weights, small_net, tmp_path, form):
    output = tmp_path / "out, a"
    status, out, err = command("export", f"weights={small_weights}", f"format={form}", f"output='{output}'")
    assert status == 0, err
    assert {file.name for file in output.iterdir()} == FILES[form]
    assert out.splitlines()[0].startswith(f"{output}: 3,242,752 parameters, ")
    assert out.splitlines()[1] == "read again, the largest difference of a logit is 0, at 32 positions"
    net = load_weights(output)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in small_net.state_dict().items())
    assert list(tmp_path.iterdir()) == [output]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of OpenAI's own form, tied, with bias, on a padded vocabulary."""
    from conftest import story_of

    from src.cli import overrides as cli
    from src.train import train

    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(story_of(900))
    overrides = [
        "model=gpt2_tiny", "model.context_length=32", "model.qkv_bias=true", "model.tie_weights=true",
        "model.vocab_size=50304", f"data.path={folder / 'text.txt'}", "trainer.max_steps=4", "callbacks=none",
        "trainer.precision=32-true", "optimizer.learning_rate=0.01",
    ]  # fmt: skip
    return train(cli.compose("train", overrides), folder / "run").folder


def test_transformers_takes_it_from_there(command, run_folder, tmp_path):
    status, out, err = command("export", f"weights={run_folder}", f"output={tmp_path / 'hf'}")
    assert status == 0, err
    assert "leaving out 47 padded rows of the vocabulary" in err
    assert "the largest difference of a logit is 0" in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = load_weights(run_folder)
    text = "the ferry bell rang over"
    tokens = tokenizer(text, return_tensors="pt")
    assert tokens["input_ids"].tolist() == [encode(text).tolist()]
    with torch.no_grad():
        expected = ours(text_to_token_ids(text))[..., :50257]
        torch.testing.assert_close(theirs(**tokens).logits, expected, atol=1e-5, rtol=0)
    written = theirs.generate(**tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(written, generate(ours, tokens["input_ids"], 20, vocab_size=50257, end_token=50256))
    assert theirs.config.vocab_size == 50257
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == 50256
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight


def test_the_card_tells_how_the_model_came_about(command, run_folder, tmp_path):
    command("export", f"weights={run_folder / 'checkpoints' / 'last.ckpt'}", f"output={tmp_path / 'hf'}")
    card = (tmp_path / "hf" / "README.md").read_text()
    record = json.loads((run_folder / "run.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    for key in "val_loss", "train_loss", "val_perplexity", "data_sha256", "optimizer_steps", "tokens_seen", "command":
        assert f"| {key.replace('_', ' ')} | `{record[key]}` |" in card
    assert f"torch {torch.__version__}" in card
    assert '"learning_rate": 0.01' in card
    parameters = sum(parameter.numel() for parameter in load_weights(tmp_path / "hf").parameters())
    assert f"| parameters | {parameters:,} |" in card


def test_the_card_is_that_of_the_checkpoint(command, tiny_run, tmp_path, long_text):
    """Not that of the end of its run, by when a learning rate that grows too large has undone it."""
    rising = ("optimizer.learning_rate=1", "schedule.warmup_steps=11", "tokenizer=gpt2", f"data.path={long_text}")
    run = tiny_run("trainer.max_steps=12", "eval.every_steps=4", *rising, "callbacks=none")
    rows = [row for row in metrics_of(run) if "val/loss" in row]
    best = min(rows, key=lambda row: row["val/loss"])
    assert best["step"] == 4
    for weights in run.folder, run.folder / "checkpoints" / "best.ckpt":
        output = tmp_path / f"of {weights.name}"
        status, _, err = command("export", f"weights={weights}", f"output='{output}'")
        assert status == 0, err
        card = (output / "README.md").read_text()
        shown = dict(re.findall(r"^\| ([\w ]+) \| `(.*)` \|$", card, re.M))
        assert shown["optimizer steps"] == str(int(best["step"]))
        assert shown["tokens seen"] == str(int(best["tokens_seen"]))
        assert float(shown["val loss"]) == pytest.approx(best["val/loss"], rel=1e-6)
        assert float(shown["train loss"]) == pytest.approx(best["train/eval_loss"], rel=1e-6)
        assert float(shown["val perplexity"]) == pytest.approx(math.exp(best["val/loss"]), rel=1e-6)
        assert shown["command"] == json.loads((run.folder / "run.json").read_text())["command"]


def test_a_card_of_a_strangers_checkpoint(command, run_folder, tmp_path):
    """Whatever it and the run.json beside it say of themselves, there is a card."""
    content = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    for number, metrics in enumerate(("none", {"val/loss": "\n# evil"}, {"val/loss": None}, [1])):
        file = tmp_path / f"{number}.ckpt"
        torch.save({**content, "run": {"metrics": metrics, "step": "1`\n# evil"}}, file)
        (tmp_path / "run.json").write_text('{"versions": [1], "command": {"a": "b"}, "config": 5}')
        status, _, err = command("export", f"weights={file}", f"output={tmp_path / str(number)}")
        assert status == 0, err
        assert "\n# evil" not in (tmp_path / str(number) / "README.md").read_text()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("form", FILES)
def test_files_are_as_the_users_umask_has_them(command, small_weights, tmp_path, form, umask):
    before = os.umask(umask)
    try:
        assert (
            command("export", f"weights={small_weights}", f"format={form}", f"output={tmp_path / 'new' / 'out'}")[0]
            == 0
        )
    finally:
        os.umask(before)
    for folder in tmp_path / "new", tmp_path / "new" / "out":
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    for file in (tmp_path / "new" / "out").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file


def test_what_transformers_trained_further_comes_back(command, small_weights, small_net, tmp_path):
    command("export", f"weights={small_weights}", f"output={tmp_path / 'hf'}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        theirs.transformer.h[0].attn.c_attn.bias += 0.5
    theirs.save_pretrained(tmp_path / "hf2")
    ours = load_weights(tmp_path / "hf2")
    assert ours.config.qkv_bias
    assert not small_net.config.qkv_bias
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.eval()(tokens).logits, atol=1e-4, rtol=0)


def test_a_vocabulary_of_its_own_goes_without_a_tokenizer(command, tmp_path):
    save_weights(
        GPT(GPTConfig(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=2)), tmp_path / "small.pt"
    )
    status, _, err = command("export", f"weights={tmp_path / 'small.pt'}", f"output={tmp_path / 'hf'}")
    assert status == 0
    assert "no tokenizer files: the model has 61 tokens" in err
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.eos_token_id is None


BAD = {
    "weights=W": "output is needed",
    "weights=W output=O format=gguf": "format=huggingface",
    "weights=nowhere output=O": "none of gpt2",
    "weights=W output=W": "already exists",
    "weights=W output=null": "output=my_model",
    "weights=null output=O": "weights=gpt2",
    "weights=W output=LINK": "already exists",
    "weights=W output=W/inside": "cannot be made in",
    "weights=W output=/proc/x": "output=<a folder elsewhere>",
    "weights=W output=FULL": "already exists",
    "weights=W output=/": "output=/ already exists; use output=<a new folder>",
    f"weights=W output={'x' * 300}": "output=<a folder elsewhere>",
}


@pytest.mark.parametrize("arguments", BAD)
def test_mistakes_are_one_line_and_write_nothing(command, small_weights, tmp_path, arguments):
    given, full = arguments, tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(full)
    for name, path in ("FULL", full), ("LINK", link), ("=W", small_weights), ("=O", tmp_path / "out"):
        arguments = arguments.replace(name, f"={path}" if name[0] == "=" else str(path))
    status, out, err = command("export", *arguments.split())
    assert (status, out) == (1, "")
    assert err.count("\n") == 1, err
    assert BAD[given] in err
    assert sorted(tmp_path.iterdir()) == [full, link]
    assert (full / "precious").read_text() == "mine"


def test_a_copy_that_differs_is_not_left_behind(command, small_weights, small_net, tmp_path, monkeypatch):
    other = GPT(small_net.config).eval()
    monkeypatch.setattr("src.interop.weights.load_weights", lambda *_, **__: other)
    status, out, err = command("export", f"weights={small_weights}", f"output={tmp_path / 'hf'}")
    assert (status, out) == (1, "")
    assert "would be another model" in err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(small_weights, tmp_path):
    """A real limit of the system on the size of a file."""
    for form in FILES:
        done = subprocess.run(
            f"ulimit -f 2000; {sys.executable} -m src.export weights={small_weights} format={form} output=out/there",
            shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": str(CONF.parent)},
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("error: output=out/there could not be written")
        assert done.stderr.endswith("; use output=<a folder elsewhere>\n")
        assert done.stderr.count("\n") == 1
        assert list((tmp_path / "out").iterdir()) == []


def test_a_neighbor_of_a_similar_name_is_left_alone(command, small_weights, tmp_path):
    (tmp_path / "hf.part").mkdir()
    (tmp_path / "hf.part" / "precious").write_text("mine")
    assert command("export", f"weights={small_weights}", "format=book", f"output={tmp_path / 'hf'}")[0] == 0
    assert (tmp_path / "hf.part" / "precious").read_text() == "mine"
    assert (tmp_path / "hf").stat().st_mode & 0o777 == (tmp_path / "hf.part").stat().st_mode & 0o777


def test_a_failed_job_fails_the_sweep(command, small_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = command("export", "-m", f"weights={small_weights}", "format=book,weights", "output=same")
    assert status == 1
    assert "output=same already exists" in err


def test_an_empty_folder_may_be_the_output(command, small_weights, tmp_path):
    (tmp_path / "hf").mkdir()
    assert command("export", f"weights={small_weights}", f"output={tmp_path / 'hf'}")[0] == 0
    assert (tmp_path / "hf" / "config.json").exists()
