"""Each kernel computes what the plain operation does that it takes the place of."""

import copy
import functools
import math
import shutil

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from src.kernels import loss as loss_module
from src.kernels import onednn
from src.kernels.attention import causal_attention
from src.kernels.dropout import FastDropout
from src.kernels.install import can_fuse_loss, pack_for_decoding, use_fast_kernels
from src.kernels.loss import fused_loss, head_and_loss
from src.kernels.onednn import FastLinear, ReorderedLinear
from src.kernels.training import compile_training, compiled, recompute_activations
from src.model.config import GPTConfig
from src.model.gpt import GPT

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
BOTH_FORMS = pytest.mark.parametrize("compiling", [False, pytest.param(True, marks=needs_compiler)])


def build(config: GPTConfig, **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(config.changed(**changes))


def plain(hidden, head, targets, reduction="mean"):
    return F.cross_entropy((hidden @ head.T).flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def both(compute, hidden, head, targets, reduction, scale=1.0):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = compute(hidden, head, targets, reduction)
    (value * scale).backward()
    return value.detach(), hidden.grad, head.grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 4, 5, 1000])
def test_value_and_gradients_in_float32(monkeypatch, reduction, rows):
    monkeypatch.setattr(loss_module, "ROWS", rows)  # one part, even parts, a shorter last one
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(2, 6, 16), torch.randn(31, 16), torch.randint(0, 31, (2, 6))
    expected, found = (both(f, hidden, head, targets, reduction, scale=0.25) for f in (plain, head_and_loss))
    for want, got in zip(expected, found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@BOTH_FORMS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_both_forms_are_cross_entropy_in_float64(monkeypatch, compiling, reduction):
    def exact(hidden, head, targets, reduction):
        logits = hidden.double() @ head.double().T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction).float()

    for name in "ROWS", "COMPILED_ROWS":
        monkeypatch.setattr(loss_module, name, 5)  # 5, 5 and 2 rows
    hidden, head, targets = torch.randn(2, 6, 16), torch.randn(31, 16), torch.randint(0, 31, (2, 6))
    targets[0, 1:4] = -100
    expected = both(exact, hidden, head, targets, reduction)
    found = both(functools.partial(head_and_loss, compiling=compiling), hidden, head, targets, reduction)
    for want, got in zip(expected, found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_the_compiled_form_stores_nothing_of_the_size_of_the_logits_but_the_gradient():
    logits, targets = torch.randn(64, 997, dtype=torch.bfloat16), torch.randint(0, 997, (64,))
    _, (code,) = run_and_get_code(compiled(loss_module._fused_losses), logits, targets, True)
    assert "empty_strided_cpu((64, 1), " in code
    assert "empty_strided_cpu((64, 997), " not in code


@BOTH_FORMS
def test_the_gradient_of_a_rare_token_survives_float16(compiling):
    """Its probability of 1e-8 is below float16's smallest number, 6e-8."""
    hidden, head, targets = torch.randn(2, 6, 16).half().float(), torch.zeros(31, 16), torch.randint(8, 31, (2, 6))
    hidden[..., 0], head[7, 0] = 1, -15
    exact = both(head_and_loss, hidden, head, targets, "mean")
    with torch.autocast("cpu", torch.float16):
        compute = functools.partial(head_and_loss, compiling=compiling)
        _, *found = both(compute, hidden, head, targets, "mean", scale=2.0**16)  # as a GradScaler does
    assert 0 < exact[2][7].abs().max() < 6e-8
    for want, got in (exact[1], found[0]), (exact[2], found[1]), (exact[2][7], found[1][7]):
        assert (got / 2**16 - want).norm() < 1e-2 * want.norm()


def test_the_same_roundings_under_autocast():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(2, 64, 32), torch.randn(301, 32) * 0.3, torch.randint(0, 301, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (both(f, hidden, head, targets, "mean") for f in (plain, head_and_loss))
    assert found[0].dtype == torch.float32
    assert torch.allclose(found[0], expected[0], rtol=1e-6)
    for want, got in zip(expected[1:], found[1:], strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).norm() < 1e-2 * want.norm()


def test_gradcheck_in_double_precision():
    hidden = torch.randn(1, 3, 4, dtype=torch.double, requires_grad=True)
    head = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    targets = torch.tensor([[0, 6, 3]])
    assert torch.autograd.gradcheck(lambda h, w: head_and_loss(h, w, targets), (hidden, head))


def test_extreme_logits_give_finite_losses_and_a_nan_stays_one():
    hidden = torch.full((1, 2, 4), 1e4)
    targets = torch.tensor([[0, 1]])
    head = torch.randn(5, 4)
    assert head_and_loss(hidden, head, targets).isfinite()
    hidden[0, 0, 0] = float("nan")
    assert head_and_loss(hidden, head, targets).isnan()


class Calls(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_does_not_compute_the_gradient(context):
    hidden, targets = torch.randn(2, 6, 16), torch.randint(0, 31, (2, 6))
    head = nn.Parameter(torch.randn(31, 16))
    with context(), Calls() as calls:
        value = head_and_loss(hidden, head, targets)
    assert torch.allclose(value, plain(hidden, head, targets)) and not value.requires_grad
    assert not {"aten::scatter_add_", "aten::exp_"} & calls.names
    with Calls() as calls:
        head_and_loss(hidden, head, targets)
    assert {"aten::scatter_add_", "aten::exp_"} <= calls.names


def test_nor_does_the_validation_of_a_run(tiny_run, monkeypatch):
    from src.training.module import PretrainingModule

    step, seen = PretrainingModule.validation_step, []

    def watched(self, *arguments):
        with Calls() as calls:
            step(self, *arguments)
        assert can_fuse_loss(self.net)
        seen.append(calls.names)

    monkeypatch.setattr(PretrainingModule, "validation_step", watched)
    tiny_run("callbacks=none", "trainer.enable_checkpointing=false", "trainer.max_steps=1")
    assert seen and all("aten::gather" in names and "aten::scatter_add_" not in names for names in seen)


def test_one_tensor_of_logits_size_is_kept_for_the_backward_pass():
    hidden = torch.randn(4, 8, 16, requires_grad=True)
    head = torch.randn(997, 16, requires_grad=True)
    targets = torch.randint(0, 997, (4, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        head_and_loss(hidden, head, targets)
    assert sum(tensor.numel() == 4 * 8 * 997 for tensor in kept) == 1


def test_targets_below_0_do_not_count():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(2, 6, 16), torch.randn(31, 16), torch.randint(0, 31, (2, 6))
    targets[0, 1:4] = -100
    for reduction in ("mean", "sum"):
        expected, found = (both(f, hidden, head, targets, reduction) for f in (plain, head_and_loss))
        for want, got in zip(expected, found, strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not found[1][0, 1:4].any()
    assert head_and_loss(hidden, head, torch.full_like(targets, -100), "sum") == 0


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_activations_computed_again_are_the_same_bits(tiny, drop_rate):
    """Dropout included, with less kept from the forward to the backward pass."""
    tokens = torch.randint(tiny.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for again in False, True:
        net, kept = build(tiny, drop_rate=drop_rate, n_layers=4), []
        if again:
            recompute_activations(net)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x)
        torch.manual_seed(5)
        with keep:
            loss = F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())
        numbers = sum(kept)
        loss.backward()
        found.append((loss.item(), [parameter.grad for parameter in net.parameters()], numbers, torch.rand(1).item()))
    (loss, gradients, numbers, drawn), again = found
    assert (loss, drawn) == (again[0], again[3])
    assert all(map(torch.equal, gradients, again[1]))
    assert again[2] < numbers / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype, p):
    layer = FastDropout(p)
    x = torch.full((1001, 999), 3.0, dtype=dtype)  # an odd number of elements
    out = layer(x)
    assert out.dtype == dtype and out.shape == x.shape
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / x.numel()) + 1e-12
    kept = out[out != 0]
    assert torch.equal(kept, torch.full_like(kept, 3.0) * torch.tensor(1 / (1 - p), dtype=dtype))
    columns, rows = (out == 0).double().mean(0), (out == 0).double().mean(1)  # no place is favoured
    assert max((columns - p).abs().max(), (rows - p).abs().max()) < 0.1
    theirs = nn.Dropout(p)(x)
    assert torch.allclose(out.max(), theirs.max())  # the same scale
    assert torch.equal(layer.eval()(x), x)


def test_dropout_follows_the_seed_and_its_neighbors_are_independent():
    layer, x = FastDropout(0.5), torch.ones(512, 512, dtype=torch.bfloat16)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert abs(((first == 0) == (second == 0)).double().mean().item() - 0.5) < 0.01
    flat = (first == 0).flatten()
    for lag in (1, 2, 3, 4, 512):  # four elements come from one random number
        assert abs((flat[lag:] == flat[:-lag]).double().mean().item() - 0.5) < 0.01


def test_gradient_of_dropout_is_its_mask():
    x = torch.randn(64, 64, requires_grad=True)
    out = FastDropout(0.3)(x)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    assert torch.allclose(x.grad[x.grad != 0], torch.tensor(1 / 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_dropout_is_causal_and_right_on_average(dtype):
    queries, keys, values = torch.randn(3, 1, 2, 12, 8).to(dtype)
    exact = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    barely = causal_attention(queries, keys, values, 1e-9)
    assert torch.allclose(barely, exact, atol=1e-6 if dtype == torch.float32 else 3e-2)
    many = torch.stack([causal_attention(queries, keys, values, 0.2).float() for _ in range(3000)])
    assert torch.allclose(many.mean(0), exact.float(), atol=0.07)
    torch.manual_seed(3)
    before = causal_attention(queries, keys, values, 0.2)
    keys[..., 7, :] += 1
    torch.manual_seed(3)
    after = causal_attention(queries, keys, values, 0.2)
    assert torch.equal(before[..., :7, :], after[..., :7, :]) and not torch.equal(before, after)


def test_gradients_of_attention_with_dropout():
    found = []
    for attend in (
        lambda q, k, v: causal_attention(q, k, v, 1e-9),  # with the mask, which drops nothing
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        torch.manual_seed(0)
        inputs = torch.randn(3, 2, 2, 12, 8, requires_grad=True)
        attend(*inputs).square().sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear_without_gradients_is_nn_linear(bias, rows):
    layer = FastLinear(33, 17, bias=bias)
    x = torch.randn(2, rows, 33)
    with torch.no_grad():
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
        layer.weight[0] += 1  # nothing is remembered of the weights
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)


def linear_classes(net: GPT) -> set[type]:
    return {type(module) for module in net.modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_model_computes_the_same(tiny, dtype, close):
    net = build(tiny, vocab_size=101, tie_weights=True, qkv_bias=True).eval().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    tokens = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        several, one = net(tokens), net(tokens[:1, :1])
        pack_for_decoding(net)
        assert linear_classes(net) == {FastLinear if dtype == torch.float32 else ReorderedLinear}
        assert torch.allclose(net(tokens), several, atol=close)
        assert torch.allclose(net(tokens[:1, :1]), one, atol=close)


@pytest.mark.parametrize("missing", ["_linear_pointwise", "_reorder_linear_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_pytorch_lacks_an_operator_the_plain_one_runs(tiny, monkeypatch, missing, dtype):
    lookup = onednn.onednn_operator
    monkeypatch.setattr(onednn, "onednn_operator", lambda name: None if name == missing else lookup(name))
    net, tokens = build(tiny).eval().to(dtype), torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        expected = net(tokens)
        pack_for_decoding(net)
        assert linear_classes(net) == {FastLinear}
        torch.testing.assert_close(net(tokens), expected, atol=1e-5, rtol=1e-5)
        if missing == "_linear_pointwise" or dtype == torch.bfloat16:
            assert torch.equal(net(tokens), expected)


def test_an_operator_that_does_not_exist():
    assert onednn.onednn_operator("_no_such_operator") is None


def values_and_gradients(net: GPT, tokens: torch.Tensor, loss) -> list[torch.Tensor]:
    value = loss(net, tokens[:, :-1], tokens[:, 1:])
    value.backward()
    return [value.detach(), *(parameter.grad for parameter in net.parameters())]


def plain_loss(net: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True, "qkv_bias": True}])
def test_a_model_with_fast_kernels_is_the_plain_one(tiny, changes):
    """In its losses, gradients, logits and state_dict; without dropout, which draws other numbers."""
    net, tokens = build(tiny, **changes), torch.randint(tiny.vocab_size, (2, 17))
    fast = copy.deepcopy(net)
    use_fast_kernels(fast)
    assert can_fuse_loss(fast) and not can_fuse_loss(net)
    expected, found = values_and_gradients(net, tokens, plain_loss), values_and_gradients(fast, tokens, fused_loss)
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    assert all(map(torch.equal, fast.state_dict().values(), net.state_dict().values()))
    assert list(fast.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens[:, 1:]), net(tokens[:, 1:]), atol=1e-5, rtol=1e-5)
    again = copy.deepcopy(fast)
    with torch.no_grad():
        again.head.weight.zero_()  # a copy of its own, kernels included
    assert fast.head.weight.any() and can_fuse_loss(again)


def test_dropout_of_a_model_with_fast_kernels_stops_in_evaluation(tiny):
    net, tokens = build(tiny, drop_rate=0.5), torch.randint(tiny.vocab_size, (1, 8))
    use_fast_kernels(net)
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_layers_of_ones_own_stay_as_they_are(tiny):
    net, tokens = build(tiny), torch.randint(tiny.vocab_size, (1, 8))
    net.blocks[0].ff.up_proj.__class__ = OwnLinear
    with torch.no_grad():
        expected = net(tokens)
        use_fast_kernels(net)
        assert type(net.blocks[0].ff.up_proj) is OwnLinear
        torch.testing.assert_close(net(tokens), expected, atol=1e-5, rtol=1e-5)


class CappedGPT(GPT):
    def forward(self, tokens, cache=None):
        return 5 * torch.tanh(super().forward(tokens, cache) / 5)


def test_logits_of_ones_own_are_not_bypassed_by_the_fused_loss(tiny):
    net = CappedGPT(tiny)
    use_fast_kernels(net)
    assert not can_fuse_loss(net)


def test_plain_kernels_train_to_the_same_losses(tiny_run):
    """Without dropout; and those that ``kernels=plain`` leaves out were there."""
    quick = ("callbacks=default", "trainer.enable_checkpointing=false", "trainer.max_steps=3", "model.drop_rate=0")
    fast, plain = (tiny_run(*quick, f"kernels={kernels}") for kernels in ("fast", "plain"))
    assert can_fuse_loss(fast.module.net) and linear_classes(plain.module.net) == {nn.Linear}
    for key in "train_loss", "val_loss":
        assert plain.record[key] == pytest.approx(fast.record[key], abs=1e-5)
    with pytest.raises(ValueError, match=r"^kernels=slow is not one of fast, plain; use kernels=fast$"):
        tiny_run("kernels=slow")


def test_all_blocks_share_one_graph(tiny, monkeypatch):
    """However many they are: PyTorch gives up after eight graphs of one function."""
    graphs = []
    counting = functools.partial(torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph)
    net = build(tiny.changed(n_layers=10))
    compile_training(net, by_block=True)
    torch.compiler.reset()
    compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", counting)
    net.hidden_states(torch.randint(tiny.vocab_size, (2, 16))).sum().backward()
    compiled.cache_clear()
    assert len(graphs) == 1


@needs_compiler
def test_compiled_training_is_the_plain_one_but_for_rounding(tiny):
    """With the other kernels and with activations computed again."""
    net, tokens = build(tiny), torch.randint(tiny.vocab_size, (2, 17))
    quick = copy.deepcopy(net)
    use_fast_kernels(quick)
    recompute_activations(quick)
    compile_training(quick)
    quick = copy.deepcopy(quick)  # as callbacks do
    expected, found = values_and_gradients(net, tokens, plain_loss), values_and_gradients(quick, tokens, fused_loss)
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)
    assert list(quick.state_dict()) == list(net.state_dict())
