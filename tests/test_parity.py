"""What Hugging Face's transformers computes, we compute."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from src.generation.beam import beam_search
from src.generation.config import Sampling
from src.generation.decode import generate, pad_left
from src.generation.sampling import filter_logits
from src.interop.huggingface import write_huggingface
from src.interop.tokenizer_files import write_tokenizer
from src.interop.weights import load_weights
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.tokenizer import encode, gpt2_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers
from transformers.generation import logits_process

FILTERS = [
    (Sampling(temperature=0.7), [logits_process.TemperatureLogitsWarper(0.7)]),
    (Sampling(temperature=1.0, top_k=7), [logits_process.TopKLogitsWarper(7)]),
    (Sampling(temperature=1.0, top_p=0.6), [logits_process.TopPLogitsWarper(0.6)]),
    (Sampling(temperature=1.0, top_p=0.001), [logits_process.TopPLogitsWarper(0.001)]),
    (Sampling(temperature=1.0, min_p=0.08), [logits_process.MinPLogitsWarper(0.08)]),
    (Sampling(temperature=1.0, repetition_penalty=1.3), [logits_process.RepetitionPenaltyLogitsProcessor(1.3)]),
    (
        Sampling(temperature=1.4, top_k=25, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.2),
            logits_process.TemperatureLogitsWarper(1.4),
            logits_process.TopKLogitsWarper(25),
            logits_process.TopPLogitsWarper(0.9),
            logits_process.MinPLogitsWarper(0.02),
        ],
    ),
]


@pytest.mark.parametrize(("sampling", "processors"), FILTERS, ids=range(len(FILTERS)))
def test_same_filtered_distributions(sampling, processors):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 97, generator=generator)
    seen = torch.randint(97, (200, 30), generator=generator)
    expected = logits.clone()
    for processor in processors:
        expected = processor(seen, expected)
    found = filter_logits(logits, sampling, seen).softmax(-1)
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-6, rtol=0)
    assert torch.equal(found > 0, expected.softmax(-1) > 0)


SHAPES = [
    GPTConfig(vocab_size=97, context_length=16, emb_dim=24, n_heads=3, n_layers=2, qkv_bias=True, tie_weights=True),
    GPTConfig(vocab_size=97, context_length=32, emb_dim=32, n_heads=4, n_layers=3, qkv_bias=True, tie_weights=False),
    GPTConfig(vocab_size=61, context_length=24, emb_dim=20, n_heads=1, n_layers=1, qkv_bias=False, tie_weights=False),
    GPTConfig(vocab_size=61, context_length=8, emb_dim=64, n_heads=8, n_layers=4, qkv_bias=False, tie_weights=True),
]


def randomised(net: torch.nn.Module, scale: float = 1.5) -> torch.nn.Module:
    """With no two parameters alike, biases and norms included, and logits far enough apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            spread = scale / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return net.eval()


@pytest.fixture(params=SHAPES, ids=lambda c: f"{c.emb_dim}x{c.n_layers}")
def pair(request, tmp_path):
    """One of our models and transformers' reading of it."""
    net = randomised(GPT(request.param))
    write_huggingface(tmp_path, net.config, net.state_dict(), None)
    return net, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()


def prompts(net: GPT, rows: int = 3, length: int = 5) -> torch.Tensor:
    return torch.randint(net.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def test_theirs_from_ours(pair):
    net, theirs = pair
    tokens = prompts(net, 4, net.config.context_length)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, net(tokens), atol=1e-5, rtol=0)
    assert theirs.num_parameters() == sum(parameter.numel() for parameter in net.parameters()) + (
        0 if net.config.qkv_bias else 3 * net.config.emb_dim * net.config.n_layers
    )


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ours_from_theirs(tmp_path, tied, sharded, safe):
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=20, n_embd=24, n_head=3, n_layer=2, tie_word_embeddings=tied, resid_pdrop=0.3
    )
    theirs = randomised(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == (6 if sharded else 1) or sharded
    if not safe:
        as_bin(tmp_path)
    net = load_weights(tmp_path)
    assert net.config == GPTConfig(
        vocab_size=97,
        context_length=20,
        emb_dim=24,
        n_heads=3,
        n_layers=2,
        drop_rate=0.3,
        qkv_bias=True,
        tie_weights=tied,
    )
    tokens = prompts(net, 4, 20)
    with torch.no_grad():
        torch.testing.assert_close(net(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def as_bin(folder: Path) -> None:
    """What older releases of transformers wrote: PyTorch's files, with masks among the tensors, without a prefix."""
    for file in folder.glob("*.safetensors"):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        if "h.0.attn.c_attn.weight" in tensors:
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 20, 20).tril()
            tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        torch.save(tensors, folder / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin"))
        file.unlink()
    for file in folder.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {
            name.removeprefix("transformer."): part.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            for name, part in index["weight_map"].items()
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        file.unlink()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_float32(tmp_path, dtype):
    config = transformers.GPT2Config(vocab_size=97, n_positions=20, n_embd=24, n_head=3, n_layer=2)
    theirs = randomised(transformers.GPT2LMHeadModel(config)).to(dtype)
    theirs.save_pretrained(tmp_path)
    net = load_weights(tmp_path)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    with torch.no_grad():
        tokens = prompts(net)
        torch.testing.assert_close(net(tokens), theirs.float()(tokens).logits, atol=1e-5, rtol=0)


def test_greedy_text_is_theirs(pair):
    net, theirs = pair
    tokens = prompts(net)
    count = net.config.context_length - 5
    expected = theirs.generate(tokens, max_new_tokens=count, do_sample=False)
    assert torch.equal(generate(net, tokens, count), expected)
    penalised = theirs.generate(tokens, max_new_tokens=count, do_sample=False, repetition_penalty=1.5)
    assert torch.equal(generate(net, tokens, count, Sampling(repetition_penalty=1.5)), penalised)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("end", ["none", "often"])
def test_beams_are_theirs(pair, penalty, end):
    net, theirs = pair
    tokens = prompts(net, rows=4, length=3)
    count = net.config.context_length - 3
    end_token = None if end == "none" else generate(net, tokens[:1], count)[0, 3 + count // 2].item()
    expected = theirs.generate(
        tokens, max_new_tokens=count, do_sample=False, num_beams=4, num_return_sequences=4, length_penalty=penalty,
        eos_token_id=end_token, pad_token_id=1, output_scores=True, return_dict_in_generate=True,
        attention_mask=torch.ones_like(tokens),
    )  # fmt: skip
    found = beam_search(net, tokens, count, 4, penalty, end_token=end_token)
    hypotheses = [hypothesis for prompt in found for hypothesis in prompt]
    for hypothesis, row, score in zip(hypotheses, expected.sequences, expected.sequences_scores, strict=True):
        written = row[3 : 3 + len(hypothesis.tokens)]
        assert torch.equal(hypothesis.tokens, written)
        assert set(row[3 + len(hypothesis.tokens) :].tolist()) <= {1}  # padding
        assert hypothesis.score == pytest.approx(score.item(), rel=1e-6, abs=1e-5)
    if end == "often" and penalty < 1:  # a large one favors texts that never end
        assert any(hypothesis.tokens[-1] == end_token for hypothesis in hypotheses)


def test_penalised_beams_are_theirs(pair):
    net, theirs = pair
    tokens = prompts(net, length=3)
    count = net.config.context_length - 3
    expected = theirs.generate(
        tokens, max_new_tokens=count, do_sample=False, num_beams=4, repetition_penalty=1.4, eos_token_id=None
    )
    found = beam_search(net, tokens, count, 4, repetition_penalty=1.4)
    assert torch.equal(torch.stack([prompt[0].tokens for prompt in found]), expected[:, 3:])


def test_rows_of_different_length_are_theirs(pair):
    net, theirs = pair
    rows = [prompts(net, 1, length)[0] for length in (5, 2, 4)]
    tokens, padding = pad_left(rows)
    attended = (torch.arange(5) >= padding.unsqueeze(1)).long()
    expected = theirs.generate(tokens, attention_mask=attended, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(net, tokens, 3, padding=padding)[:, 5:], expected[:, 5:])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, gpt2_tokenizer(), 1024)
    slow = tmp_path_factory.mktemp("slow")
    for name in "vocab.json", "merges.txt":
        (slow / name).write_bytes((folder / name).read_bytes())
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return transformers.AutoTokenizer.from_pretrained(folder), transformers.GPT2Tokenizer.from_pretrained(slow)


TEXTS = [
    "Every effort moves you", "", " leading, trailing ", "tabs\t\tand\n\n\nlines\r\n", "Жук и ёж",
    "\U0001f469\u200d\U0001f680\U0001f1ea\U0001f1fa", "x" * 300, "don't we'll I'M", "<|endoftext|>",
    "a<|endoftext|>b", "\u00a0\u2028nbsp", "123456789,00", "\ufdfd", "e\u0301",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_their_tokenizer_is_ours(tokenizers, text):
    for tokenizer in tokenizers:
        tokens = tokenizer(text)["input_ids"]
        assert tokens == encode(text).tolist()
        assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


@given(st.text(max_size=60))
def test_their_tokenizer_is_ours_on_any_text(tokenizers, text):
    assert tokenizers[0](text)["input_ids"] == encode(text).tolist()


def test_their_tokenizer_knows_the_end_of_text(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
        assert len(tokenizer) == 50257
    assert tokenizers[0].model_max_length == 1024
