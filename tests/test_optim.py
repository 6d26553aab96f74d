import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from src.model.gpt import GPT
from src.training.optim import build_optimizer, learning_rate_at, parameter_groups
from src.training.sections import OptimizerConfig, ScheduleConfig

COSINE = ScheduleConfig("warmup_cosine", warmup_steps=10, initial_lr=1e-5, min_lr=1e-4)


def test_warmup_is_linear_and_reaches_the_peak():
    rates = [learning_rate_at(step, 100, 1e-3, COSINE) for step in range(100)]
    assert rates[0] == 1e-5
    assert rates[5] == pytest.approx((1e-5 + 1e-3) / 2)
    assert rates[10] == 1e-3 == max(rates)
    assert rates[55] == pytest.approx((1e-3 + 1e-4) / 2)  # half way down the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)


@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(1e-6, 1))
def test_rate_stays_between_its_ends(total, warmup, peak):
    schedule = ScheduleConfig("warmup_cosine", warmup_steps=warmup)
    for step in range(0, total + 10):
        assert 0 <= learning_rate_at(step, total, peak, schedule) <= peak * (1 + 1e-12)
    assert learning_rate_at(total, total, peak, schedule) == peak / 10


def test_warmup_as_share_or_steps():
    assert ScheduleConfig(warmup_steps=0.2).resolved_warmup(50) == 10
    assert ScheduleConfig(warmup_steps=7).resolved_warmup(50) == 7
    assert ScheduleConfig(warmup_steps=0).resolved_warmup(50) == 0


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5), st.sampled_from(["linear", "sqrt"]))
def test_stable_between_warmup_and_decay(total, warmup, decay, shape):
    schedule = ScheduleConfig(
        "warmup_stable_decay", warmup_steps=warmup, decay_steps=decay, decay=shape, initial_lr=1e-5, min_lr=1e-4
    )
    rates = [learning_rate_at(step, total, 1e-3, schedule) for step in range(total)]
    up, down = schedule.resolved_warmup(total), total - schedule.resolved_decay(total)
    assert rates[:up] == sorted(rates[:up])
    assert set(rates[up : down + 1]) <= {1e-3}
    assert all(above > below for above, below in zip(rates[down:], rates[down + 1 :], strict=False))
    assert min(rates[up:], default=1e-3) >= 1e-4
    assert {learning_rate_at(step, total, 1e-3, schedule) for step in (total, total + 7)} == {1e-4}


def test_decay_of_a_plateau():
    """Linear is half way down at half time, 1 - sqrt at a quarter (Hägele et al. 2024)."""
    plateau = ScheduleConfig("warmup_stable_decay", warmup_steps=10, decay_steps=40, min_lr=0)
    assert learning_rate_at(80, 100, 1.0, plateau) == 0.5
    assert learning_rate_at(70, 100, 1.0, plateau.changed(decay="sqrt")) == 0.5
    longer = [learning_rate_at(step, 200, 1.0, plateau) for step in range(60)]
    assert longer == [learning_rate_at(step, 100, 1.0, plateau) for step in range(60)]  # what was made stays true


@pytest.mark.parametrize("values", [{"decay_steps": 1.5}, {"decay_steps": -1}, {"decay": "cubic"}])
def test_impossible_schedules(values):
    with pytest.raises(ValueError, match=rf"schedule\.{next(iter(values))}=.*; use schedule\.{next(iter(values))}="):
        ScheduleConfig("warmup_stable_decay", **values)


def test_constant():
    assert {learning_rate_at(step, 100, 3e-4, ScheduleConfig()) for step in (0, 50, 1000)} == {3e-4}
    assert learning_rate_at(5, math.inf, 3e-4, ScheduleConfig()) == 3e-4


@pytest.mark.parametrize("tie_weights", [False, True])
def test_every_parameter_in_one_group(tiny, tie_weights):
    net = GPT(tiny.changed(tie_weights=tie_weights, qkv_bias=True))
    decayed, rest = parameter_groups(net, OptimizerConfig(weight_decay=0.3))
    assert decayed["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in rest["params"])
    assert {id(p) for group in (decayed, rest) for p in group["params"]} == {id(p) for p in net.parameters()}
    (everything,) = parameter_groups(net, OptimizerConfig(decay="all"))
    assert len(everything["params"]) == len(list(net.parameters()))


def test_adamw_step_is_the_papers(tiny):
    torch.manual_seed(0)
    net = GPT(tiny)
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.2)
    optimizer = build_optimizer(net, config)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net(torch.randint(tiny.vocab_size, (2, 8))).logsumexp(-1).mean().backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        decay = 0.2 if parameter.dim() == 2 else 0.0
        gradient = parameter.grad  # at the first step the bias-corrected moments are the gradient and its square
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5)


MUON = OptimizerConfig("muon", learning_rate=0.01, weight_decay=0.2)


@pytest.fixture
def stepped(tiny):
    """``stepped(net, optimizer, seed)`` makes one step on gradients drawn from ``seed``."""

    def step(net, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    return step


@pytest.mark.parametrize("tie_weights", [False, True])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(tiny, stepped, tie_weights):
    """Muon's update is the gradient's nearest orthogonal matrix, U V' of its SVD, as large as an update of AdamW's."""
    torch.manual_seed(0)
    net = GPT(tiny.changed(tie_weights=tie_weights, qkv_bias=True))
    other = copy.deepcopy(net)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    stepped(net, build_optimizer(net, MUON), seed=1)
    stepped(other, build_optimizer(other, MUON.changed(name="adamw")), seed=1)
    by_adamw = dict(other.named_parameters())
    for name, parameter in net.named_parameters():
        if not (name.startswith("blocks.") and parameter.dim() == 2):
            torch.testing.assert_close(parameter, by_adamw[name], atol=0, rtol=0)
            continue
        update = (before[name] * (1 - 0.01 * 0.2) - parameter.detach()) / 0.01
        left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
        assert F.cosine_similarity(update.flatten(), (left @ right).flatten(), dim=0) > 0.95, name
        smaller, larger = sorted(parameter.shape)
        assert update.norm() / math.sqrt(smaller * larger) == pytest.approx(0.2, rel=0.25), (
            name
        )  # AdamW's is 0.2 to 0.4


def test_muon_goes_on_from_what_was_saved(tiny, stepped):
    """Both momenta survive PyTorch's safe loading, and the groups stay those that a schedule changes."""
    torch.manual_seed(0)
    net = GPT(tiny)
    optimizer = build_optimizer(net, MUON)
    stepped(net, optimizer, seed=1)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = GPT(tiny)
    again.load_state_dict(saved["net"])
    resumed = build_optimizer(again, MUON.changed(learning_rate=1.0))
    resumed.load_state_dict(saved["optimizer"])
    for group in (*optimizer.param_groups, *resumed.param_groups):
        group["lr"] /= 2
    stepped(net, optimizer, seed=2)
    stepped(again, resumed, seed=2)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, atol=0, rtol=0)


def test_a_scaler_leaves_muons_overflowing_step_out(tiny, stepped):
    net = GPT(tiny)
    optimizer, scaler = build_optimizer(net, MUON), torch.amp.GradScaler("cpu")
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    scaler.scale(net(torch.randint(tiny.vocab_size, (1, 4))).sum()).backward()
    net.blocks[0].ff.up_proj.weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
    stepped(net, optimizer, seed=1)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


@pytest.mark.parametrize(
    "values",
    [
        {"momentum": 1},
        {"momentum": -0.1},
        {"learning_rate": 0},
        {"weight_decay": -1},
        {"betas": [0.9]},
        {"betas": [0.9, 1]},
        {"eps": 0},
        {"decay": "none"},
    ],
)
def test_impossible_optimizers(values):
    with pytest.raises(
        ValueError, match=rf"optimizer\.{next(iter(values))}=.*; use '?optimizer\.{next(iter(values))}="
    ):
        OptimizerConfig(**values)
