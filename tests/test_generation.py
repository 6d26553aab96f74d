import pytest
import torch

from src.generation.decode import generate
from src.generation.sampling import next_token
from src.model.gpt import GPT


@pytest.fixture
def net(tiny):
    torch.manual_seed(0)
    return GPT(tiny)


def uncached_greedy(net: GPT, tokens: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        window = tokens[:, -net.config.context_length :]
        tokens = torch.cat([tokens, net(window)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 16, 25])
def test_greedy_equals_the_uncached_computation_past_the_window(net, rows, length):
    tokens = torch.randint(net.config.vocab_size, (rows, length))
    assert torch.equal(generate(net, tokens, 40), uncached_greedy(net, tokens, 40))


def test_nothing_is_read_twice_within_the_window(net, monkeypatch):
    read, forward = [], net.forward
    monkeypatch.setattr(net, "forward", lambda tokens, cache: read.append(tokens.shape[1]) or forward(tokens, cache))
    generate(net, torch.zeros(1, 5, dtype=torch.int64), 12)
    assert read == [5] + [1] * 11


def test_own_generator_decides_and_mode_is_given_back(net):
    tokens = torch.zeros(2, 3, dtype=torch.int64)

    def sample(seed):
        return generate(net, tokens, 10, temperature=1.5, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    net.eval()
    sample(1)
    assert not net.training


def test_sampling_draws_from_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]])
    draws = next_token(logits.expand(20000, -1), 0.7, 3, torch.Generator().manual_seed(0)).flatten()
    kept = torch.tensor([2.0, 1.0, 5.0])
    expected = torch.zeros(5)
    expected[[0, 1, 4]] = torch.softmax(kept / 0.7, dim=0)
    frequency = draws.bincount(minlength=5) / 20000
    torch.testing.assert_close(frequency, expected, atol=0.005, rtol=0)


def test_each_row_may_have_its_own_temperature(net):
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    temperatures = torch.tensor([[0.0], [2.0], [0.0]])
    rows = generate(net, tokens, 12, temperatures, top_k=50, generator=torch.Generator().manual_seed(0))
    greedy = generate(net, tokens[:1], 12)[0]
    assert torch.equal(rows[0], greedy)
    assert torch.equal(rows[2], greedy)
    assert not torch.equal(rows[1], greedy)


@pytest.mark.parametrize("top_k", [None, 0, 5, 1000])
def test_top_k_that_keeps_all(top_k):
    logits = torch.randn(50, 5)
    all_kept = next_token(logits, 1.0, None, torch.Generator().manual_seed(0))
    assert torch.equal(next_token(logits, 1.0, top_k, torch.Generator().manual_seed(0)), all_kept)


def test_what_has_no_next_token(net):
    with pytest.raises(ValueError, match="empty prompt"):
        generate(net, torch.zeros(1, 0, dtype=torch.int64), 1)
    for wrong in {"temperature": -1}, {"temperature": 1, "top_k": -2}:
        with pytest.raises(ValueError, match="cannot be negative"):
            next_token(torch.zeros(1, 5), **wrong)
