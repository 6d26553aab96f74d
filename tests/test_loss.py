"""The fused head and loss are the plain ones, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F

from src.training import loss as loss_module
from src.training.loss import next_token_loss


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
    expected, found = (both(f, hidden, head, targets, reduction, scale=0.25) for f in (plain, next_token_loss))
    for want, got in zip(expected, found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_same_roundings_under_autocast():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(2, 64, 32), torch.randn(301, 32) * 0.3, torch.randint(0, 301, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (both(f, hidden, head, targets, "mean") for f in (plain, next_token_loss))
    assert found[0].dtype == torch.float32
    assert torch.allclose(found[0], expected[0], rtol=1e-6)
    for want, got in zip(expected[1:], found[1:], strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).norm() < 1e-2 * want.norm()


def test_gradcheck_in_double_precision():
    hidden = torch.randn(1, 3, 4, dtype=torch.double, requires_grad=True)
    head = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    targets = torch.tensor([[0, 6, 3]])
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, targets), (hidden, head))


def test_extreme_logits_give_finite_losses_and_a_nan_stays_one():
    hidden = torch.full((1, 2, 4), 1e4)
    targets = torch.tensor([[0, 1]])
    head = torch.randn(5, 4)
    assert next_token_loss(hidden, head, targets).isfinite()
    hidden[0, 0, 0] = float("nan")
    assert next_token_loss(hidden, head, targets).isnan()


def test_without_gradients_nothing_is_overwritten_or_kept():
    hidden, head, targets = torch.randn(2, 6, 16), torch.randn(31, 16), torch.randint(0, 31, (2, 6))
    with torch.no_grad():
        value = next_token_loss(hidden, head, targets)
    assert torch.allclose(value, plain(hidden, head, targets)) and not value.requires_grad


def test_one_tensor_of_logits_size_is_kept_for_the_backward_pass():
    hidden = torch.randn(4, 8, 16, requires_grad=True)
    head = torch.randn(997, 16, requires_grad=True)
    targets = torch.randint(0, 997, (4, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        next_token_loss(hidden, head, targets)
    assert sum(tensor.numel() == 4 * 8 * 997 for tensor in kept) == 1


def test_targets_below_0_do_not_count():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(2, 6, 16), torch.randn(31, 16), torch.randint(0, 31, (2, 6))
    targets[0, 1:4] = -100
    for reduction in ("mean", "sum"):
        expected, found = (both(f, hidden, head, targets, reduction) for f in (plain, next_token_loss))
        for want, got in zip(expected, found, strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not found[1][0, 1:4].any()
    assert next_token_loss(hidden, head, torch.full_like(targets, -100), "sum") == 0
