"""A tokenizer is chosen by name, and a run, its checkpoints, its exports and its shards keep it."""

import inspect
import json
import os
import random
import re

import pytest
import tiktoken
from conftest import TINY, column
from tiktoken_ext import openai_public
from transformers import AutoTokenizer

from src.cli.overrides import compose
from src.data.config import PrepareConfig, TokenizerConfig
from src.data.manifest import read_manifest
from src.data.prepare import prepare_shards
from src.data.tokenizers import build_tokenizer
from src.export import export
from src.generation.config import GenerationConfig
from src.generation.text import continue_texts
from src.interop.tokenizer_files import write_tokenizer
from src.interop.weights import build, read_model
from src.prepare import check as check_prepare
from src.tokenizer import pieces
from src.tokenizer.encoding import (
    encode,
    fingerprint,
    gpt2_tokenizer,
    token_ids_to_text,
    token_ranks,
    unknown_characters,
)
from src.tokenizer.pieces import separable
from src.tokenizer.reading import from_json
from src.tokenizer.table import as_dictionary, make_encoding, portable, to_json
from src.training.config import TrainConfig

TEXTS = {
    "English": "It's the ferry's bell, isn't it? They'll row 1234567 times.\n\n  Two spaces, a tab\tand an end.  ",
    "German": "Die Fähre läutet; über dem Fluß ist's still. Größe: 12,5 m\r\n",
    "Japanese": "渡し舟の鐘が茶色い川の上で鳴った。カラオケ　一二三。\n",
    "emoji": "👩‍👩‍👧‍👦 rows 🚣🏽‍♀️, e\u0301 is é 🎉🎉\n",
    "code": "def ring(bell: int) -> None:\n\tif bell != 0x1F:\n        return [*range(10)]  # !!\n",
}
ALL = "".join(TEXTS.values()) * 3
KINDS = ("gpt2", "byte", "char", "bpe", "cl100k pattern", "o200k pattern")


def pattern_of(name: str) -> str:
    """The pattern in tiktoken's source of an encoding whose table it would download."""
    source = inspect.getsource(getattr(openai_public, name))
    return "|".join(re.findall(r'r"""(.*?)"""', source))


def made(kind: str) -> tiktoken.Encoding:
    if kind.endswith("pattern"):
        pattern = portable(pattern_of(f"{kind.split()[0]}_base"))
        return make_encoding(token_ranks(made("bpe")), pattern, {"<|endoftext|>": 399}, "bpe")
    return build_tokenizer(TokenizerConfig(name=kind, vocab_size=400 if kind == "bpe" else None), [ALL])


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    parts = [*set(ALL), *"\u3000\u0301\x00\u200b", "  ", "\r\n", "n't", "'S", "123", "<|endoftext|>", "\n\n \n"]
    return ["".join(draw.choices(parts, k=draw.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_and_hugging_face_finds_the_same_ids(tmp_path, kind, trials):
    tokenizer = made(kind)
    write_tokenizer(tmp_path, tokenizer, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS.values(), *random_texts(trials(500, 10_000))]:
        ids = encode(text, tokenizer).tolist()
        assert theirs.encode(text) == ids, text
        assert (
            b"".join(map(tokenizer.decode_single_token_bytes, ids)).decode()
            == (text if kind != "char" else "".join(one if one in ALL else "\ufffd" for one in text))
            or "<|endoftext|>" in text
        )
        without_end = text.replace("<|endoftext|>", "")
        halves = separable([without_end[:9], without_end[9:]], tokenizer=tokenizer)
        assert [i for half in halves for i in encode(half, tokenizer)] == encode(without_end, tokenizer).tolist(), text


@pytest.mark.parametrize("kind", ["cl100k", "o200k"])
def test_a_portable_pattern_splits_as_the_original_does(kind):
    original = pattern_of(f"{kind}_base")
    ranks, special = token_ranks(made("bpe")), {"<|endoftext|>": 399}
    theirs = tiktoken.Encoding("original", pat_str=original, mergeable_ranks=ranks, special_tokens=special)
    ours = made(f"{kind} pattern")
    for text in [*TEXTS.values(), *random_texts(500)]:
        assert encode(text, ours).tolist() == theirs.encode(text, allowed_special="all")


@pytest.mark.parametrize("kind", KINDS)
def test_its_file_is_all_of_it(kind):
    tokenizer = made(kind)
    again = from_json(json.dumps(as_dictionary(tokenizer)))
    assert (again.name, fingerprint(again)) == (tokenizer.name, fingerprint(tokenizer))
    assert (to_json(tokenizer) is None) == (kind == "gpt2")  # which is packaged


def test_gpt2s_published_tokenizer_json_is_the_packaged_tokenizer():
    assert from_json(json.dumps(as_dictionary(gpt2_tokenizer()))) is gpt2_tokenizer()


def test_sizes_and_names():
    assert made("byte").n_vocab == 257
    assert made("bpe").n_vocab == 400
    assert made("char").n_vocab == len({*ALL, "\ufffd"}) + 1
    assert [made(kind).name.split("-")[0] for kind in KINDS[:4]] == ["gpt2", "byte", "char", "bpe"]


def test_bpe_has_fewer_tokens_than_bytes_and_is_the_same_each_time():
    assert len(encode(ALL, made("bpe"))) < 0.5 * len(ALL.encode())
    assert fingerprint(made("bpe")) == fingerprint(made("bpe"))


def test_on_a_gpu_the_vocabulary_is_padded():
    config = TrainConfig(tokenizer={"name": "byte"}, model={"vocab_size": None})
    assert config.with_vocabulary(257, 64).model.vocab_size == 320
    assert config.with_vocabulary(257).model.vocab_size == 257


def test_a_character_that_is_not_in_the_training_text():
    tokenizer = build_tokenizer(TokenizerConfig(name="char"), ["abc", "\n"])
    assert unknown_characters("aäbß\n", tokenizer) == "ßä"
    assert unknown_characters("aäbß\n", gpt2_tokenizer()) == ""
    ids = encode("a<|endoftext|>äb<|endoftext|", tokenizer).tolist()
    end, unknown, a, b = (tokenizer.encode_single_token(one) for one in ("<|endoftext|>", "\ufffd", "a", "b"))
    assert ids[:4] == [a, end, unknown, b]
    assert encode("<|endoftext|>", tokenizer, "text").tolist().count(unknown) == len("<|endoftext|>")


@pytest.fixture
def mixed(tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_text(ALL * 4, encoding="utf-8")
    return path


CHOICES = {"gpt2": ["tokenizer=gpt2"], "byte": ["tokenizer=byte"], "char": ["tokenizer=char"]}
CHOICES["bpe"] = ["tokenizer=bpe", "tokenizer.vocab_size=400"]


def text_of(weights) -> str:
    """What the model that ``weights`` names writes after a prompt, with its own tokenizer."""
    model = read_model(str(weights))
    settings = GenerationConfig(max_new_tokens=30, seed=3)
    (found,) = continue_texts(
        build(model.config, model.weights).eval(), ["the bell"], settings, tokenizer=model.tokenizer
    )
    return found[0].text


@pytest.mark.parametrize("kind", CHOICES)
def test_a_run_its_continuation_and_its_export_write_the_same(tmp_path, tiny_run, mixed, kind):
    given = [f"data.path={mixed}", *CHOICES[kind], "trainer.max_epochs=null"]
    whole = tiny_run(*given, "trainer.max_steps=12")
    assert len(column(whole, "train/loss")) == 12
    assert whole.record["config"]["model"]["vocab_size"] == whole.datamodule.tokenizer.n_vocab
    assert (whole.folder / "tokenizer.json").exists() == (kind != "gpt2")

    part = tiny_run(*given, "trainer.max_steps=6", "schedule=constant")
    resumed = tiny_run(*given, "trainer.max_steps=12", "schedule=constant", resume=part.folder)
    straight = tiny_run(*given, "trainer.max_steps=12", "schedule=constant")
    assert column(resumed, "train/loss") == column(straight, "train/loss")

    written = text_of(whole.folder)
    for form in "huggingface", "weights", "book":
        output = tmp_path / f"{kind}-{form}"
        export(compose("export", [f"weights={whole.folder}", f"output={output}", f"format={form}"]))
        assert text_of(output) == written
    own = read_model(str(tmp_path / f"{kind}-weights")).tokenizer
    assert fingerprint(own) == fingerprint(whole.datamodule.tokenizer)

    tuned = tiny_run(f"data.path={mixed}", f"weights={whole.folder}", "trainer.max_steps=2", model=())
    assert tuned.datamodule.tokenizer.name == own.name


def test_two_tokenizers_are_not_mixed(tmp_path, tiny_run, mixed):
    run = tiny_run(f"data.path={mixed}", "tokenizer=char", "trainer.max_steps=2", "schedule=constant")
    name = run.datamodule.tokenizer.name
    refused = rf"tokenizer=byte differs from {name} in .*, which brings its own; use tokenizer=char$"
    for given in [f"weights={run.folder}"], [f"ckpt_path={run.folder}/checkpoints/last.ckpt"]:
        with pytest.raises(ValueError, match=refused):
            tiny_run(f"data.path={mixed}", "tokenizer=byte", *given, model=())
    given = f"data.path={mixed}", "trainer.max_steps=4", "schedule=constant"
    for other in "gpt2", "byte":
        with pytest.raises(ValueError, match=refused.replace("byte", other)):
            tiny_run(*given, f"tokenizer={other}", resume=run.folder)


def test_shards_keep_their_tokenizer(tmp_path, tiny_run, mixed):
    folder = tmp_path / "shards"
    prepare_shards(PrepareConfig(source=str(mixed), output=str(folder), tokenizer=TokenizerConfig(name="byte")))
    assert read_manifest(folder)["tokenizer"] == fingerprint(made("byte"))
    given = "data=shards", f"data.path={folder}", "trainer.max_steps=2"
    shards = [one for one in given if one != f"data.path={folder}"]
    run = tiny_run(*shards, f"data.path={folder}")
    assert run.datamodule.tokenizer.name == made("byte").name
    head = token_ids_to_text(run.datamodule.train_windows[0][0], run.datamodule.tokenizer)
    assert head in ALL * 4
    with pytest.raises(ValueError, match=rf"holds tokens of the tokenizer {made('byte').name}, not of char; use"):
        tiny_run(*shards, f"data.path={folder}", "tokenizer=char")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"name": "file"},
            "tokenizer.name=file names none; use tokenizer=file tokenizer.path=<a tokenizer.json or a table>",
        ),
        ({"name": "bpe"}, "tokenizer.name=bpe has no size; use tokenizer=bpe"),
        (
            {"name": "bpe", "vocab_size": 12},
            "tokenizer.vocab_size=12 must be at least 258; use tokenizer.vocab_size=4096",
        ),
        (
            {"name": "word"},
            "tokenizer.name=word is not one of gpt2, byte, char, bpe, cl100k_base, o200k_base, file; use",
        ),
    ],
)
def test_a_wrong_choice_is_one_line(given, message):
    with pytest.raises(ValueError) as error:
        TokenizerConfig(**given)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it does not exist"),
        ("{}", r"tokenizer\.json cannot be read \(KeyError"),
        ("[1]", r"tokenizer\.json cannot be read \(TypeError"),
        ("nonsense", r"tokenizer\.json is not JSON"),
        ({"normalizer": {"type": "NFC"}}, "normalizes texts"),
        ({"added_tokens": []}, r"has no <\|endoftext\|> among its added tokens"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "neither byte-level BPE nor one token per character"),
        ("reordered", "in another order than it merges them"),
        ("twice", "two with the same content or number"),
        ("negative", "whose number is not one below 10,000,000"),
        ("huge", "whose number is not one below 10,000,000"),
        ("fraction", "whose number is not one below 10,000,000"),
        ("partial pattern", "a pattern that leaves out parts of a text"),
        ("removes", "neither byte-level BPE nor one token per character"),
        ("empty name", "a token that is empty"),
        ("unmerged", "has tokens that its merges do not make"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, content, reason):
    file = tmp_path / "tokenizer.json"
    good = as_dictionary(made("bpe"))
    if content == "reordered":
        good["model"]["merges"].reverse()
        content = {}
    elif content == "unmerged":
        good["model"]["merges"].pop()
        content = {}
    numbers = {"twice": 5, "negative": -1, "huge": 2**40, "fraction": 20.5}
    if isinstance(content, str) and content in numbers:
        good["model"]["vocab"]["a"] = numbers[content]
        content = {}
    elif content in ("partial pattern", "removes"):
        good = as_dictionary(made("cl100k pattern"))
        split = good["pre_tokenizer"]["pretokenizers"][0]
        split |= {"behavior": "Removed"} if content == "removes" else {"pattern": {"Regex": "[0-9]+"}}
        content = {}
    elif content == "empty name":
        good["added_tokens"].append({**good["added_tokens"][0], "content": "", "id": 900})
        content = {}
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(good | content))
    with pytest.raises(ValueError, match=reason) as error:
        build_tokenizer(TokenizerConfig(name="file", path=str(file)))
    assert "\n" not in str(error.value)
    assert re.match(r"tokenizer\.path=.* is not a tokenizer: .*; use tokenizer\.path=<", str(error.value))


@pytest.mark.parametrize(
    "lines", ["YQ== 0\nYQ== 1", "YQ== 0\nYg== 0", "YQ== -1", "YQ== 99999999999", "a b c", "!! 3", ""]
)
def test_a_table_that_is_none_is_one_line(tmp_path, lines):
    (tmp_path / "a.tiktoken").write_text(lines)
    with pytest.raises(ValueError, match=r"^tokenizer\.path=\S+a\.tiktoken is not a tokenizer: [^\n]*; use [^\n]*$"):
        build_tokenizer(TokenizerConfig(name="file", path=str(tmp_path / "a.tiktoken")))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="is no file of at most 64 MiB"):
        build_tokenizer(TokenizerConfig(name="file", path=str(tmp_path / "tokenizer.json")))


def test_a_text_of_lines_without_blanks_is_cut_at_its_lines(monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST", 50)
    text = "鐘が鳴った。\n" * 40
    for kind in "char", "cl100k pattern", "o200k pattern":
        tokenizer = made(kind)
        parts = list(separable([text[:100], text[100:]], tokenizer=tokenizer))
        assert len(parts) > 1
        assert [i for part in parts for i in encode(part, tokenizer)] == encode(text, tokenizer).tolist()


def test_a_tiktoken_table(tmp_path):
    from src.tokenizer.encoding import RANK_TABLE

    found = build_tokenizer(TokenizerConfig(name="file", path=str(RANK_TABLE)))
    assert fingerprint(found) == fingerprint(gpt2_tokenizer())


def test_a_text_too_short_for_the_vocabulary():
    with pytest.raises(
        ValueError, match=r"^tokenizer.vocab_size=4096 is more than the \d+ tokens that this text yields; use"
    ):
        build_tokenizer(TokenizerConfig(name="bpe", vocab_size=4096), ["abc abc"])


def test_a_published_one_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"^tokenizer=cl100k_base could not be fetched \(\w+\); use tokenizer=gpt2, or"
    ):
        build_tokenizer(TokenizerConfig(name="cl100k_base"))


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_shards_are_not_made_with_a_tokenizer_of_a_text_that_is_not_read(name):
    with pytest.raises(ValueError, match=rf"^tokenizer={name} is made from a training text"):
        check_prepare(compose("prepare", ["source=x", "output=y", f"tokenizer={name}"]))


def test_the_size_of_the_vocabulary_follows_the_tokenizer(tiny_run):
    config = compose("train", [*TINY])
    assert config.model.vocab_size is None
    run = tiny_run("tokenizer=byte", "trainer.max_steps=1")
    assert run.module.net.config.vocab_size == 257
    padded = tiny_run("tokenizer=byte", "model.vocab_size=320", "trainer.max_steps=1")
    assert padded.module.net.config.vocab_size == 320
    for given in ["tokenizer=byte", "model.vocab_size=256"], ["tokenizer=char", "model.vocab_size=5"]:
        with pytest.raises(
            ValueError, match=r"^model\.vocab_size=\d+ is less than the tokenizer's \d+; use model\.vocab"
        ):
            tiny_run(*given)
