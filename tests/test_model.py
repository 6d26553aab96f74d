import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from src.checkpoint.find import read_checkpoint
from src.interop.weights import load_weights
from src.model.architectures import ARCHITECTURES, build_model
from src.model.cache import KVCache
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.training.module import PretrainingModule

GPT2 = {"context_length": 1024, "qkv_bias": True, "tie_weights": True}
SIZES = {"small": (768, 12, 12), "medium": (1024, 16, 24), "large": (1280, 20, 36), "xl": (1600, 25, 48)}


class ReluSquared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square()


class ReluSquaredGPT(GPT):
    """ReLU squared (So et al. 2021) instead of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.ff.activation = ReluSquared()


def build(config: GPTConfig, **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(config.changed(**changes))


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("size", "count"),
    [("small", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080), ("xl", 1_557_611_200)],
)
def test_parameter_counts_of_openais_models(size, count):
    emb_dim, n_heads, n_layers = SIZES[size]
    with torch.device("meta"):
        assert parameters(GPT(GPTConfig(emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers, **GPT2))) == count


def test_parameter_count_of_the_books_model():
    with torch.device("meta"):
        assert parameters(GPT(GPTConfig(context_length=1024))) == 163_009_536  # the book, section 4.6


def reference_logits(net: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The same model from the textbook: one head at a time, scores masked and normalized by hand."""
    config = net.config
    x = net.tok_emb.weight[tokens] + net.pos_emb.weight[: tokens.shape[1]]
    later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for block in net.blocks:
        normed = F.layer_norm(x, (config.emb_dim,), block.norm1.weight, block.norm1.bias)
        q, k, v = block.attn.qkv(normed).split(config.emb_dim, dim=-1)
        size, heads = config.emb_dim // config.n_heads, []
        for h in range(config.n_heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., part])
        x = x + block.attn.out_proj(torch.cat(heads, dim=-1))
        normed = F.layer_norm(x, (config.emb_dim,), block.norm2.weight, block.norm2.bias)
        h = block.ff.up_proj(normed)
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + block.ff.down_proj(gelu)
    return net.head(F.layer_norm(x, (config.emb_dim,), net.final_norm.weight, net.final_norm.bias))


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_weights": True}, {"init": "torch", "n_heads": 1}])
def test_logits_equal_the_textbook(tiny, changes):
    net = build(tiny, **changes)
    tokens = torch.randint(tiny.vocab_size, (3, 11))
    torch.testing.assert_close(net(tokens), reference_logits(net, tokens), atol=1e-5, rtol=1e-5)


def test_no_token_sees_a_later_one(tiny):
    net = build(tiny)
    tokens = torch.randint(tiny.vocab_size, (1, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % tiny.vocab_size
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 1, 6, 3]])
def test_cached_equals_uncached(tiny, chunks):
    net = build(tiny, init="torch")
    tokens = torch.randint(tiny.vocab_size, (2, 16))
    cache = KVCache(tiny, batch_size=2)
    pieces = [net(chunk, cache) for chunk in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), net(tokens), atol=1e-5, rtol=1e-5)
    assert cache.length == 16


def test_too_many_tokens(tiny):
    net, tokens = build(tiny), torch.zeros(1, 10, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"^model\.context_length=16 is too short for 17 tokens; use .* or model\.context_length=17$"
    ):
        net(torch.zeros(1, 17, dtype=torch.int64))
    cache = KVCache(tiny, batch_size=1)
    net(tokens, cache)
    with pytest.raises(ValueError, match="too short for 20 tokens"):
        net(tokens, cache)


def test_gpt2_initialization():
    net = build(GPTConfig(vocab_size=2000, context_length=200, emb_dim=256, n_heads=4, n_layers=4, qkv_bias=True))
    for name, parameter in net.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert parameter.eq(1.0 if "norm" in name and name.endswith("weight") else 0.0).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(8) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.1 * expected, name


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_torch_initialization_is_drawn_in_the_books_order(tiny, qkv_bias):
    net = build(tiny, init="torch", qkv_bias=qkv_bias)
    C, V, T = tiny.emb_dim, tiny.vocab_size, tiny.context_length
    torch.manual_seed(0)
    expected = [nn.Embedding(V, C).weight, nn.Embedding(T, C).weight]
    for _ in range(tiny.n_layers):
        query, key, value = (nn.Linear(C, C, bias=qkv_bias) for _ in range(3))
        rest = [nn.Linear(C, C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)]
        expected.append(torch.cat([query.weight, key.weight, value.weight]))
        if qkv_bias:
            expected.append(torch.cat([query.bias, key.bias, value.bias]))
        expected += [tensor for linear in rest for tensor in (linear.weight, linear.bias)]
    expected.append(nn.Linear(C, V, bias=False).weight)
    drawn = [parameter for name, parameter in net.named_parameters() if "norm" not in name]
    assert all(torch.equal(mine, book) for mine, book in zip(drawn, expected, strict=True))


def test_tied_head_is_the_token_embedding(tiny):
    net = build(tiny, tie_weights=True)
    assert net.head.weight is net.tok_emb.weight
    assert parameters(build(tiny)) - parameters(net) == tiny.vocab_size * tiny.emb_dim
    assert build(tiny, tie_weights=True, init="torch").head.weight.std().item() == pytest.approx(1, rel=0.05)


def test_dropout_in_training_only(tiny):
    net = build(tiny, drop_rate=0.5)
    tokens = torch.randint(tiny.vocab_size, (1, 8))
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


def test_each_place_of_dropout_counts(tiny):
    tokens = torch.randint(tiny.vocab_size, (1, 8))
    for place in "embedding", "attention", "residual":
        net = build(tiny, drop_rate=0.5)
        exact = build(tiny).eval()(tokens)
        net.dropout.p = 0.5 if place == "embedding" else 0.0
        for block in net.blocks:
            block.attn.drop_rate = 0.5 if place == "attention" else 0.0
            block.dropout.p = 0.5 if place == "residual" else 0.0
        assert not torch.allclose(net(tokens), exact), place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_heads": 5},
            r"model\.emb_dim=24 is not divisible by model\.n_heads=5; use model\.n_heads=4 or model\.emb_dim=25",
        ),
        ({"n_layers": 0}, r"^model\.n_layers=0 must be at least 1; use model\.n_layers=12$"),
        ({"n_layers": 10**9}, r"model\.n_layers=1000000000 must be at most 10,000; use"),
        ({"emb_dim": 10**12}, r"model\.emb_dim=1000000000000 must be at most"),
        ({"n_heads": 10**12}, r"model\.n_heads=1000000000000 must be at most"),
        ({"emb_dim": 99_991, "n_heads": 99_990}, r"model\.n_heads=1 or"),
        ({"drop_rate": 1.0}, r"model\.drop_rate=1\.0 must be below 1\.0; use model\.drop_rate=0\.1"),
        ({"init": "zeros"}, r"^model\.init=zeros is not one of gpt2, torch; use model\.init=gpt2$"),
        ({"init": "\x1b[31m\n" + "x" * 99}, r"^model\.init='\\x1b\[31m\\n\w*\.\.\.\w*' is"),
    ],
)
def test_impossible_shapes(tiny, changes, message):  # at once, however far it is to a divisor
    with pytest.raises(ValueError, match=message):
        tiny.changed(**changes)


def test_all_impossible_numbers_at_once():
    with pytest.raises(ValueError) as error:
        GPTConfig(vocab_size=-1, n_layers=-1, drop_rate=2, init="?")
    assert len(str(error.value).splitlines()) == 4


def test_another_activation_is_another_model(tiny):
    net, gpt2 = ReluSquaredGPT(tiny), build_model(tiny)
    gpt2.load_state_dict(net.state_dict())
    tokens = torch.randint(tiny.vocab_size, (1, 8))
    assert type(gpt2) is GPT and not torch.allclose(net(tokens), gpt2(tokens))


def test_a_model_class_of_ones_own_trains_and_loads_from_its_checkpoint(monkeypatch, tiny_run):
    monkeypatch.setitem(ARCHITECTURES, "relu_squared", ReluSquaredGPT)
    run = tiny_run("++model.architecture=relu_squared", "trainer.max_steps=2", "callbacks=none")
    path = run.folder / "checkpoints" / "last.ckpt"
    assert run.record["optimizer_steps"] == 2
    assert read_checkpoint(path)["hyper_parameters"]["model"]["architecture"] == "relu_squared"
    tokens = torch.randint(257, (1, 8))
    expected = run.module.eval()(tokens)
    for net in load_weights(path), PretrainingModule.load_from_checkpoint(path).net.eval():
        assert isinstance(net, ReluSquaredGPT)
        assert torch.equal(net(tokens), expected)
    monkeypatch.delitem(ARCHITECTURES, "relu_squared")  # on a machine that does not have the class
    with pytest.raises(ValueError, match=r"model\.architecture=relu_squared is not one of gpt2; use"):
        load_weights(path)


def test_unknown_architecture(tiny, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "relu_squared", ReluSquaredGPT)
    message = r"^model\.architecture=os\.system is not one of gpt2, relu_squared; use model\.architecture=gpt2$"
    with pytest.raises(ValueError, match=message):
        build_model(tiny.changed(architecture="os.system"))
