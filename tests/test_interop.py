"""Weights move between this project, OpenAI, Hugging Face and the book without losing a bit."""

import importlib.util
import json
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from src.checkpoint.storage import write_sealed
from src.interop.book import write_book
from src.interop.bundle import MAGIC, read_bundle
from src.interop.huggingface import write_huggingface
from src.interop.locate import HUB, locate
from src.interop.names import CONV1D, from_ours, shapes, their_names
from src.interop.weights import build, load_weights, read_weights, save_weights
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.tokenizer.encoding import gpt2_tokenizer, token_ranks
from src.tokenizer.merges import merges_of


def sized(vocab_size, context_length, emb_dim, n_heads, n_layers, **others) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size, context_length=context_length, emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers,
        **others,
    )  # fmt: skip


CONFIGS = [
    sized(61, 16, 24, 3, 2, qkv_bias=True, tie_weights=True),
    sized(61, 16, 24, 3, 2, qkv_bias=False, tie_weights=False, drop_rate=0.3, init="torch"),
    sized(61, 16, 24, 3, 12, qkv_bias=True, tie_weights=False),
]


def random_net(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    net = GPT(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(params=CONFIGS, ids=["OpenAI's form", "the book's form", "twelve layers"])
def net(request) -> GPT:
    return random_net(request.param)


def assert_same(net: GPT, other: GPT) -> None:
    assert net.config == other.config
    assert net.state_dict().keys() == other.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert (other.head.weight is other.tok_emb.weight) == net.config.tie_weights
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in other.parameters())
    assert not other.training


def test_shapes_are_the_models(net):
    assert shapes(net.config) == {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def test_every_name_is_in_the_table_and_no_two_share_one(net):
    for layout in "huggingface", "openai", "book":
        theirs = [one for name in net.state_dict() for one in their_names(name, layout)]
        assert len(theirs) == len(set(theirs)) >= len(net.state_dict()) - 1


def test_ours_there_and_back(net, tmp_path):
    save_weights(net, tmp_path / "weights.pt")
    assert_same(net, load_weights(tmp_path / "weights.pt"))
    assert_same(net, load_weights(tmp_path))


def test_huggingface_there_and_back(net, tmp_path):
    write_huggingface(tmp_path, net.config, net.state_dict(), None)
    assert_same(net, load_weights(tmp_path))
    assert_same(net, load_weights(tmp_path / "model.safetensors"))


def test_biases_that_were_trained_since_are_kept(tmp_path):
    net = random_net(CONFIGS[0].changed(qkv_bias=False))
    write_huggingface(tmp_path, net.config, net.state_dict(), None)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.1.attn.c_attn.bias"][5] = 0.25
    save_file(tensors, tmp_path / "model.safetensors")
    again = load_weights(tmp_path)
    assert again.config.qkv_bias
    assert again.blocks[1].attn.qkv.bias[5] == 0.25


class BooksAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        for name in "W_query", "W_key", "W_value":
            setattr(self, name, nn.Linear(cfg["emb_dim"], cfg["emb_dim"], bias=cfg["qkv_bias"]))
        self.out_proj = nn.Linear(cfg["emb_dim"], cfg["emb_dim"])
        self.heads, T = cfg["n_heads"], cfg["context_length"]
        self.register_buffer("mask", torch.triu(torch.ones(T, T), diagonal=1))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.W_query, self.W_key, self.W_value))
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask[:T, :T].bool(), -torch.inf)
        return self.out_proj((torch.softmax(scores / k.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).reshape(B, T, C))


class BooksNorm(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(emb_dim)), nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        variance = x.var(-1, keepdim=True, unbiased=False)
        return self.scale * (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) + self.shift


class BooksBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg["emb_dim"]
        self.att = BooksAttention(cfg)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C))
        self.norm1, self.norm2 = BooksNorm(C), BooksNorm(C)

    def forward(self, x):
        x = x + self.att(self.norm1(x))
        return x + self.ff.layers(self.norm2(x))


class BooksModel(nn.Module):
    """A model in the shape of the book's chapter 4, from its GPT_CONFIG."""

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.trf_blocks = nn.Sequential(*(BooksBlock(cfg) for _ in range(cfg["n_layers"])))
        self.final_norm = BooksNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, tokens):
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


def test_book_there_and_back(net, tmp_path):
    write_book(tmp_path, net.config, net.state_dict())
    plain = net.config.changed(init="gpt2")  # of which a trained model knows nothing
    for path in tmp_path, tmp_path / "model.pth":
        again = load_weights(path)
        assert_same(build(plain, net.state_dict()).eval(), again)
    theirs = BooksModel(json.loads((tmp_path / "model.json").read_text()))
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))  # strictly, masks and all
    tokens = torch.randint(61, (3, 16))
    with torch.no_grad():
        expected = theirs.eval()(tokens)
        assert (net(tokens) - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_books_model_and_optimizer(tmp_path, compiled):
    cfg = {"vocab_size": 61, "context_length": 8, "emb_dim": 128, "n_heads": 2, "n_layers": 2, "qkv_bias": False}
    theirs = BooksModel(cfg)
    optimizer = torch.optim.AdamW(theirs.parameters())
    theirs(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = {("_orig_mod." if compiled else "") + name: tensor for name, tensor in theirs.state_dict().items()}
    path = tmp_path / "model_and_optimizer.pth"
    torch.save({"model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()}, path)
    net = load_weights(path)  # two heads of 64, since the file does not say
    assert net.config == sized(61, 8, 128, 2, 2)
    tokens = torch.randint(61, (3, 8))
    torch.testing.assert_close(net(tokens), theirs(tokens), atol=1e-5, rtol=0)


def test_book_that_does_not_say_its_heads(tmp_path):
    net = random_net(CONFIGS[1])
    write_book(tmp_path, net.config, net.state_dict())
    (tmp_path / "model.json").unlink()
    with pytest.raises(ValueError, match=r"how many heads.*n_heads.*model\.json") as error:
        load_weights(tmp_path / "model.pth")
    assert "\n" not in str(error.value)


def bundle(tensors: dict[str, np.ndarray], prefix, block_entries: int = 5) -> None:
    """A checkpoint in TensorFlow's format: a LevelDB table of Protocol Buffers messages, and the values."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    def block(entries: list[tuple[bytes, bytes]]) -> bytes:
        out, last = b"", b""
        for key, value in entries:
            shared = next(
                (i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last))
            )
            out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            last = key
        return out + struct.pack("<II", 0, 1)

    data, entries = b"", [(b"", b"\x08\x01\x1a\x02\x08\x01")]
    for name, array in sorted(tensors.items()):
        shape = b"".join(b"\x12" + varint(len(dim)) + dim for dim in (b"\x08" + varint(n) for n in array.shape))
        kind = {np.dtype("float32"): 1, np.dtype("int64"): 9}[array.dtype]
        value = b"\x08" + varint(kind) + b"\x12" + varint(len(shape)) + shape
        value += b"\x20" + varint(len(data)) + b"\x28" + varint(array.nbytes) + b"\x35" + bytes(4)
        entries.append((name.encode(), value))
        data += array.tobytes()
    file, index = b"", []
    for first in range(0, len(entries), block_entries):
        part = entries[first : first + block_entries]
        content = block(part)
        index.append((part[-1][0], varint(len(file)) + varint(len(content))))
        file += content + bytes(5)
    handles = []
    for content in block([]), block(index):
        handles.append(varint(len(file)) + varint(len(content)))
        file += content + bytes(5)
    file += b"".join(handles).ljust(40, b"\0") + MAGIC
    prefix.with_name(f"{prefix.name}.index").write_bytes(file)
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)


def openai_tensors(net: GPT) -> dict[str, np.ndarray]:
    tensors = {f"model/{name}": tensor.numpy() for name, tensor in from_ours(net.state_dict(), "openai").items()}
    return {name: array[None] if name.endswith("/w") else array for name, array in tensors.items()}


def write_hparams(folder, config: GPTConfig) -> None:
    numbers = {"n_vocab": config.vocab_size, "n_ctx": config.context_length, "n_embd": config.emb_dim,
               "n_head": config.n_heads, "n_layer": config.n_layers}  # fmt: skip
    (folder / "hparams.json").write_text(json.dumps(numbers))


@pytest.mark.parametrize("block_entries", [1, 5, 1000])
def test_openai_checkpoint_there_and_back(tmp_path, block_entries):
    net = random_net(CONFIGS[0].changed(n_layers=11))
    tensors = {**openai_tensors(net), "global_step": np.array(7)}
    bundle(tensors, tmp_path / "model.ckpt", block_entries)
    write_hparams(tmp_path, net.config)
    assert_same(net, load_weights(tmp_path))
    assert_same(net, load_weights(tmp_path / "model.ckpt"))
    assert_same(net, load_weights(tmp_path / "model.ckpt.index"))


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason='pip install -e ".[tensorflow]"')
def test_checkpoint_that_tensorflow_itself_has_written(tmp_path):
    net = random_net(CONFIGS[0].changed(n_layers=11))
    np.savez(tmp_path / "tensors.npz", **{name.replace("/", "|"): array for name, array in openai_tensors(net).items()})
    code = (
        "import sys, numpy as np, tensorflow as tf\n"
        "tf1 = tf.compat.v1; tf1.disable_eager_execution()\n"
        "arrays = np.load(sys.argv[1] + '/tensors.npz')\n"
        "for name in arrays: tf1.get_variable(name.replace('|', '/'), initializer=arrays[name])\n"
        "tf1.get_variable('global_step', initializer=np.int64(7))\n"
        "with tf1.Session() as session:\n"
        "    session.run(tf1.global_variables_initializer())\n"
        "    tf1.train.Saver().save(session, sys.argv[1] + '/model.ckpt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    write_hparams(tmp_path, net.config)
    assert_same(net, load_weights(tmp_path))
    assert set(dict(read_bundle(tmp_path / "model.ckpt"))) == set(openai_tensors(net))


GPT2 = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
SIZES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 16, 24), "gpt2-large": (1280, 20, 36), "gpt2-xl": (1600, 25, 48)}


@pytest.mark.parametrize("name", GPT2)
def test_parameters_of_openais_own(name):
    emb_dim, n_heads, n_layers = SIZES[name]
    config = sized(50257, 1024, emb_dim, n_heads, n_layers, qkv_bias=True, tie_weights=True)
    with torch.device("meta"):
        net = GPT(config)
    assert sum(parameter.numel() for parameter in net.parameters()) == GPT2[name]
    assert name in HUB


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self, body: bool = True):
        self.asked.append(self.path)
        repository, revision = HUB["gpt2"]
        if self.path.startswith(f"/api/models/{repository}"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": repository, "sha": revision, "siblings": siblings, "private": False}).encode()
            if "/tree/" in self.path:
                content = json.dumps([{"type": "file", "path": name, "size": len(file), "oid": name}
                                      for name, file in self.files.items()]).encode()  # fmt: skip
            tag = "api"
        else:
            name = self.path.split(f"{revision}/")[-1].split("?")[0]
            if name not in self.files or f"/{repository}/resolve/{revision}/" not in self.path:
                self.send_error(404)
                return
            content, tag = self.files[name], f"tag-{name}"
        first = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("X-Repo-Commit", revision)
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if body:
            self.wfile.write(content[first:])

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *_):
        pass


def in_cache(code: str, tmp_path, **env: str) -> subprocess.CompletedProcess:
    import os

    settings = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **env}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True, timeout=120
    )


LOAD = "from src.interop.weights import load_weights; print(load_weights('gpt2').config)"


def test_a_name_is_fetched_once_and_then_found_without_a_network(tmp_path):
    net = random_net(CONFIGS[0])
    write_huggingface(tmp_path, net.config, net.state_dict(), None)
    Hub.files = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    Hub.files["rust_model.ot"] = b"of no use here"
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = in_cache(LOAD, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        assert done.stdout.strip() == str(net.config), done.stderr
        asked = len(Hub.asked)
        assert not any("rust_model" in path for path in Hub.asked)
        again = in_cache(LOAD, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        assert again.stdout == done.stdout
        assert len(Hub.asked) == asked
    finally:
        server.shutdown()
    offline = in_cache(LOAD, tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout


def test_a_name_without_a_network(tmp_path):
    done = in_cache(LOAD, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: weights=gpt2 is not in the Hugging Face cache and could not be downloaded (")
    assert "hf download openai-community/gpt2 --revision 607a30d7" in last


def test_merges_rebuild_every_token():
    ranks = token_ranks(gpt2_tokenizer())
    merges = merges_of(ranks)
    assert len(merges) == 50000
    assert [left + right for left, right in merges] == sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__)
    assert merges[0] == (b" ", b"t")


def broken(folder, what: str) -> None:
    """A Hugging Face folder with one thing wrong."""
    net = random_net(CONFIGS[0])
    write_huggingface(folder, net.config, net.state_dict(), None)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif what == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif what == "empty file":
        file.write_bytes(b"")
    elif what == "shape":
        save_file({**tensors, "transformer.h.1.ln_2.bias": torch.zeros(23)}, file)
    elif what == "transposed":
        name = "transformer.h.0.mlp.c_fc.weight"
        save_file({**tensors, name: tensors[name].t().contiguous()}, file)
    elif what == "integers":
        save_file({**tensors, "transformer.ln_f.bias": torch.zeros(24, dtype=torch.int64)}, file)
    elif what == "missing":
        save_file({name: t for name, t in tensors.items() if "h.1.ln_1" not in name}, file)
    elif what == "unexpected":
        save_file({**tensors, "score.weight": torch.zeros(2, 24)}, file)
    elif what == "layers":
        config["n_layer"] = 9999
    elif what == "more layers":
        config["n_layer"] = 10**9
    elif what == "heads":
        config["n_head"] = 7
    elif what == "type":
        config["n_head"] = "three"
    elif what == "other model":
        config["model_type"] = "llama"
    elif what == "activation":
        config["activation_function"] = "relu"
    elif what == "no json":
        (folder / "config.json").write_text("{")
    elif what == "a list":
        (folder / "config.json").write_text("[]")
    elif what in ("shard", "outside"):
        file.rename(folder / "model-00001-of-00002.safetensors")
        part = "../secret.safetensors" if what == "outside" else "model-00002-of-00002.safetensors"
        weight_map = {**dict.fromkeys(tensors, "model-00001-of-00002.safetensors"), "more": part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if what in ("layers", "more layers", "heads", "type", "other model", "activation"):
        (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    "truncated": "damaged",
    "header": "damaged",
    "empty file": "damaged",
    "shape": "h.1.ln_2.bias is (23,) float32, the model has (24,)",
    "transposed": "h.0.mlp.c_fc.weight is (96, 24) float32, the model has (24, 96)",
    "integers": "ln_f.bias is (24,) int64",
    "missing": "it lacks h.1.ln_1.weight, h.1.ln_1.bias",
    "unexpected": "score.weight, which a model of this config does not have",
    "layers": "too few for a model of 9999 layers",
    "more layers": "n_layers=1000000000 must be at most 10,000",
    "heads": "n_heads",
    "type": "n_heads='three' is not an integer",
    "other model": "model_type='llama', this model is a gpt2",
    "activation": "activation_function='relu'",
    "no json": "config.json is not JSON",
    "a list": "config.json does not hold a JSON object",
    "shard": "it lacks model-00002-of-00002.safetensors",
    "outside": "not in the folder",
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_told_in_one_line(tmp_path, what):
    broken(tmp_path, what)
    with pytest.raises(ValueError, match=r"^weights=") as error:
        load_weights(tmp_path)
    assert BROKEN[what] in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("; use weights=<another file or folder>")


@pytest.mark.parametrize("what", ["index", "data", "no data", "no hparams", "hparams", "two"])
def test_broken_openai_folders_are_told_in_one_line(tmp_path, what):
    net = random_net(CONFIGS[0])
    bundle(openai_tensors(net), tmp_path / "model.ckpt")
    write_hparams(tmp_path, net.config)
    index, data = tmp_path / "model.ckpt.index", tmp_path / "model.ckpt.data-00000-of-00001"
    if what == "index":
        index.write_bytes(index.read_bytes()[:-20])
    elif what == "data":
        data.write_bytes(data.read_bytes()[:-20])
    elif what == "no data":
        data.unlink()
    elif what == "no hparams":
        (tmp_path / "hparams.json").unlink()
    elif what == "hparams":
        (tmp_path / "hparams.json").write_text('{"n_vocab": 5}')
    elif what == "two":
        (tmp_path / "other.ckpt.index").write_bytes(index.read_bytes())
    with pytest.raises(ValueError, match=r"^weights=") as error:
        load_weights(tmp_path)
    assert "\n" not in str(error.value)
    assert {"index": "damaged", "data": "damaged", "no data": "No such file", "no hparams": "no hparams.json",
            "hparams": "n_ctx", "two": "2 checkpoints"}[what] in str(error.value)  # fmt: skip


def test_a_damaged_index_never_hangs_or_crashes(tmp_path):
    net = random_net(CONFIGS[0])
    bundle(openai_tensors(net), tmp_path / "model.ckpt")
    write_hparams(tmp_path, net.config)
    whole = (tmp_path / "model.ckpt.index").read_bytes()
    refused, draw = 0, np.random.default_rng(0)
    for trial in range(1000):
        index = bytearray(whole)
        for at in draw.integers(len(index), size=3):
            index[at] ^= 1 << trial % 8
        (tmp_path / "model.ckpt.index").write_bytes(index)
        try:
            load_weights(tmp_path)  # what was hit may be of no use
        except ValueError as error:
            refused += 1
            assert str(error).startswith("weights=")
            assert "\n" not in str(error)
    assert refused > 500


NOWHERE = {
    "nowhere": "none of gpt2, gpt2-medium, gpt2-large, gpt2-xl",
    "gpt3": "none of gpt2",
    "empty": "a folder without weights",
    "sweep": "a sweep of several runs; use weights=",
    "orphan": "no config.json",
    "orphan/model.safetensors": "no config.json",
    "text.txt": "damaged",
}


@pytest.mark.parametrize("place", NOWHERE)
def test_where_no_weights_are(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    for folder in "empty", "sweep/0/checkpoints", "sweep/1/checkpoints", "orphan":
        (tmp_path / folder).mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, tmp_path / "orphan" / "model.safetensors")
    (tmp_path / "text.txt").write_text("no weights " * 20)
    with pytest.raises(ValueError, match=rf"^weights={place}") as error:
        read_weights(place)
    assert NOWHERE[place] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_called_like_a_name_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("gpt2").kind == "hub"
    assert locate("openai-community/gpt2-xl").kind == "hub"
    net = random_net(CONFIGS[0])
    (tmp_path / "gpt2").mkdir()
    write_huggingface(tmp_path / "gpt2", net.config, net.state_dict(), None)
    assert_same(net, load_weights("gpt2"))


def test_a_run_folder_gives_its_best_or_else_its_newest(tiny_run):
    run = tiny_run("trainer.max_steps=4", "eval.every_steps=2", "callbacks=none")
    best = run.folder / "checkpoints" / "best.ckpt"
    weights = torch.load(best, weights_only=True)["state_dict"]
    for path in run.folder, run.folder / "checkpoints":
        assert torch.equal(load_weights(path).tok_emb.weight, weights["net.tok_emb.weight"])
    damaged = bytearray(best.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    best.unlink()  # it may be last.ckpt by another name
    best.write_bytes(damaged)
    assert torch.equal(load_weights(run.folder).tok_emb.weight, run.module.net.tok_emb.weight)
    for file in run.folder.glob("checkpoints/*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        load_weights(run.folder)


def test_a_tied_head_follows_in_training(net):
    again = build(net.config, net.state_dict())
    again(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    assert (again.head.weight.grad is again.tok_emb.weight.grad) == net.config.tie_weights
    assert not torch.equal(next(again.parameters()).data_ptr and again.tok_emb.weight, net.tok_emb.weight + 1)


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path):
    net = random_net(CONFIGS[0].changed(tie_weights=False))
    write_huggingface(tmp_path, net.config, net.state_dict(), None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert_same(net, load_weights(tmp_path))


def test_a_tied_file_may_hold_the_head_alone(tmp_path):
    net = random_net(CONFIGS[0])
    write_huggingface(tmp_path, net.config, net.state_dict(), None)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(net, load_weights(tmp_path))


def test_the_file_that_is_named_is_the_file_that_is_read(tmp_path):
    nets = {}
    for name in "model", "other":
        nets[name] = random_net(CONFIGS[0])
        nets[name].pos_emb.weight.data.fill_(len(nets))
        write_huggingface(tmp_path, nets[name].config, nets[name].state_dict(), None)
        (tmp_path / "model.safetensors").rename(tmp_path / f"{name}.kept")
        bundle(openai_tensors(nets[name].requires_grad_(False)), tmp_path / f"{name}.ckpt")
    for name in nets:
        (tmp_path / f"{name}.kept").rename(tmp_path / f"{name}.safetensors")
    write_hparams(tmp_path, CONFIGS[0])
    for name, net in nets.items():
        for file in f"{name}.safetensors", f"{name}.ckpt", f"{name}.ckpt.index":
            assert torch.equal(load_weights(tmp_path / file).pos_emb.weight, net.pos_emb.weight), file


EVIL = "\x1b[31m\r\nerror: \u202e\x9b" + "x" * 10**5

BOMBS = {
    "expanded": lambda net: {**net, "pos_emb.weight": torch.zeros(1).expand(10**9, 24)},
    "a list": lambda net: [1, 2],
    "a tensor": lambda net: torch.zeros(3),
    "no tensor": lambda net: {**net, "pos_emb.weight": 5},
    "a number for a name": lambda net: {**net, 5: torch.zeros(3)},
    "sparse": lambda net: {**net, "pos_emb.weight": torch.zeros(16, 24).to_sparse()},
    "infinite": lambda net: {**net, "pos_emb.weight": torch.full((16, 24), torch.inf)},
    "escapes": lambda net: {**net, EVIL: torch.zeros(3)},
    "float8": lambda net: {**net, "pos_emb.weight": torch.zeros(16, 24).to(torch.float8_e4m3fn)},
    "complex": lambda net: {**net, "pos_emb.weight": torch.zeros(16, 24, dtype=torch.complex64)},
    "nested": lambda net: {**net, "pos_emb.weight": torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])},
    "beyond float32": lambda net: {**net, "pos_emb.weight": torch.full((16, 24), 1e300, dtype=torch.float64)},
    "strides of 0": lambda net: {**net, "pos_emb.weight": torch.zeros(16 * 24)[:24].expand(16, 24)},
    "one row for all": lambda net: (
        {**net, "pos_emb.weight": torch.zeros(16 * 24).as_strided((16, 24), (1, 1))}
        | {name: torch.zeros(10**4).as_strided((100, 100, 100), (1, 1, 1)) for name in map(str, range(9))}
    ),
}


@pytest.mark.parametrize("form", ["book", "huggingface"])
@pytest.mark.parametrize("what", BOMBS)
def test_strange_files_are_told_in_one_line(tmp_path, what, form):
    net = random_net(CONFIGS[1])
    layout = from_ours(net.state_dict(), form)
    if form == "book":
        write_book(tmp_path, net.config, net.state_dict())
        file = tmp_path / "model.pth"
    else:
        write_huggingface(tmp_path, net.config, net.state_dict(), None)
        (tmp_path / "model.safetensors").unlink()
        file = tmp_path / "pytorch_model.bin"
        layout = {name.replace("wpe.weight", "pos_emb.weight"): tensor for name, tensor in layout.items()}
    content = BOMBS[what](layout)
    if form == "huggingface" and isinstance(content, dict):
        content = {"wpe.weight" if name == "pos_emb.weight" else name: value for name, value in content.items()}
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"^weights=") as error:
        load_weights(tmp_path)
    assert_fit_for_a_terminal(error.value)


def assert_fit_for_a_terminal(error: ValueError) -> None:
    assert str(error).isprintable()  # in one line, without escape sequences
    assert len(str(error)) < 1000
    assert str(error).endswith(("; use weights=<another file or folder>", "/checkpoints/last.ckpt"))


@pytest.mark.parametrize("form", ["huggingface", "book", "ours"])
def test_layers_that_share_their_memory_do_not_unfold(tmp_path, form):
    config = sized(61, 16, 24, 3, 300, qkv_bias=True, tie_weights=True)
    tied = random_net(config.changed(n_layers=1))
    weights = tied.state_dict()
    for name in [name for name in weights if name.startswith("blocks.0.")]:
        weights |= {name.replace(".0.", f".{layer}."): weights[name] for layer in range(300)}
    if form == "ours":
        file, content = tmp_path / "weights.pt", {"config": config.model_dump(), "state_dict": weights}
    elif form == "book":
        file, content = tmp_path / "model.pth", {}
        for name, tensor in weights.items():
            names = their_names(name, "book")
            content |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    else:
        write_huggingface(tmp_path, config, weights, None)
        (tmp_path / "model.safetensors").unlink()
        file = tmp_path / "pytorch_model.bin"
        content = {their_names(n, form)[0]: t.t() if n.endswith(CONV1D) else t for n, t in weights.items()}
    write_sealed(content, file)
    assert file.stat().st_size < 1e6
    with pytest.raises(ValueError, match=r"its tensors claim 8,\d*,\d* bytes, the file holds \d\d,\d*;") as error:
        load_weights(file)
    assert_fit_for_a_terminal(error.value)


NAMES = {
    "config.json": ("n_embd", "n_head", "n_layer", "vocab_size", "n_positions", "resid_pdrop", "tie_word_embeddings",
                    "model_type", "activation_function", "layer_norm_epsilon", "n_inner", "gpt2_lightning"),
    "hparams.json": ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"),
    "model.json": ("n_heads", "drop_rate"),
    "model.safetensors.index.json": ("weight_map",),
}  # fmt: skip


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in NAMES.items() for key in keys])
def test_what_a_file_says_does_not_reach_the_terminal_as_it_is(tmp_path, file, key):
    net = random_net(CONFIGS[0]).requires_grad_(False)
    if file == "hparams.json":
        bundle(openai_tensors(net), tmp_path / "model.ckpt")
        write_hparams(tmp_path, net.config)
    elif file == "model.json":
        write_book(tmp_path, net.config, net.state_dict())
    else:
        write_huggingface(tmp_path, net.config, net.state_dict(), None)
    content = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    for value in EVIL, [EVIL], {EVIL: EVIL}, 10**4000:
        wrong = {"init": value} if key == "gpt2_lightning" else value
        (tmp_path / file).write_text(json.dumps({**content, key: wrong}))
        with pytest.raises(ValueError, match=r"^weights=") as error:
            load_weights(tmp_path)
        assert_fit_for_a_terminal(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"])
@pytest.mark.parametrize("value", [10**12, EVIL])
def test_sizes_beyond_any_model_are_refused_at_once(tmp_path, key, value):
    config = {**CONFIGS[0].model_dump(), key: value}
    write_sealed({"config": config, "state_dict": {}}, tmp_path / "weights.pt")
    started = time.perf_counter()
    with pytest.raises(
        ValueError, match=rf"model\.{key}=.* (must be at most [\d,]*|should be a valid integer)"
    ) as error:
        load_weights(tmp_path)
    assert time.perf_counter() - started < 1
    assert_fit_for_a_terminal(error.value)


@pytest.mark.parametrize("where", ["tensor", "metadata", "header", "openai"])
def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(tmp_path, where):
    net = random_net(CONFIGS[0]).requires_grad_(False)
    if where == "openai":
        bundle({**openai_tensors(net), "model/" + EVIL[:500]: np.zeros(3, np.float32)}, tmp_path / "model.ckpt")
        write_hparams(tmp_path, net.config)
    else:
        write_huggingface(tmp_path, net.config, net.state_dict(), None)
        tensors = load_file(tmp_path / "model.safetensors")
        more = {} if where == "metadata" else {EVIL: torch.zeros(1)}
        save_file({**tensors, **more}, tmp_path / "model.safetensors", metadata={EVIL: EVIL})
    if where in ("metadata", "header"):  # no longer what it says that it is
        file = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(file.replace(b'"F32"', b'"\x1b31"', 1))
    with pytest.raises(ValueError, match=r"^weights=") as error:
        load_weights(tmp_path)
    assert_fit_for_a_terminal(error.value)


def test_an_archive_that_unfolds_is_refused(tmp_path):
    torch.save({"tok_emb.weight": torch.zeros(10**6)}, tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        parts = {file: archive.read(file) for file in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(ValueError, match="compressed"):
        load_weights(tmp_path)


STRANGE_NUMBERS = [1.0, True, None, "3", float("nan"), -1, 0, 10**13, [3]]


@pytest.mark.parametrize("value", STRANGE_NUMBERS, ids=str)
@pytest.mark.parametrize("form", ["huggingface", "openai", "book"])
def test_strange_numbers_of_heads_are_told_in_one_line(tmp_path, form, value):
    net = random_net(CONFIGS[0].changed(qkv_bias=True))
    if form == "huggingface":
        write_huggingface(tmp_path, net.config, net.state_dict(), None)
        file, key = "config.json", "n_head"
    elif form == "openai":
        bundle(openai_tensors(net.requires_grad_(False)), tmp_path / "model.ckpt")
        write_hparams(tmp_path, net.config)
        file, key = "hparams.json", "n_head"
    else:
        write_book(tmp_path, net.config, net.state_dict())
        file, key = "model.json", "n_heads"
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**content, key: value}))
    with pytest.raises(ValueError, match=r"^weights=.*n_heads") as error:
        load_weights(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / file).write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"^weights=.* is not JSON"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    "index", [b"\xff" * 3_000_000 + MAGIC, b"\0" * 40 + MAGIC, MAGIC, b""], ids=["long", "zeros", "magic", "empty"]
)
def test_an_index_of_nonsense(tmp_path, index):
    (tmp_path / "model.ckpt.index").write_bytes(index)
    write_hparams(tmp_path, CONFIGS[0])
    with pytest.raises(ValueError, match=r"^weights=.*(damaged|0 tensors)"):
        load_weights(tmp_path)


def test_a_config_of_endless_size_is_not_read(tmp_path):
    write_huggingface(tmp_path, CONFIGS[0], random_net(CONFIGS[0]).state_dict(), None)
    with (tmp_path / "config.json").open("r+b") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(ValueError, match=r"its config\.json is not JSON \(more than 17 MB\)"):
        load_weights(tmp_path)


def test_a_state_dict_alone_is_not_enough(tmp_path):
    net = random_net(CONFIGS[0])
    torch.save(OrderedDict(net.state_dict()), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="no GPT of this project or of the book"):
        load_weights(tmp_path / "plain.pt")
