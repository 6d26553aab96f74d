import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.model.gpt import GPT
from src.training.config import OptimizerConfig, ScheduleConfig
from src.training.optim import build_optimizer, learning_rate_at, parameter_groups

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


def test_constant():
    assert {learning_rate_at(step, 100, 3e-4, ScheduleConfig()) for step in (0, 50, 1000)} == {3e-4}
    assert learning_rate_at(5, math.inf, 3e-4, ScheduleConfig()) == 3e-4


@pytest.mark.parametrize("tie_weights", [False, True])
def test_every_parameter_in_one_group(tiny, tie_weights):
    from dataclasses import replace

    net = GPT(replace(tiny, tie_weights=tie_weights, qkv_bias=True))
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


@pytest.mark.parametrize(
    "values",
    [{"learning_rate": 0}, {"weight_decay": -1}, {"betas": [0.9]}, {"betas": [0.9, 1]}, {"eps": 0}, {"decay": "none"}],
)
def test_impossible_optimizers(values):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(values))}=.*: '?optimizer\.{next(iter(values))}="):
        OptimizerConfig(**values)
