import itertools
import math

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import Calls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from src.generation.beam import beam_search
from src.generation.config import GenerationConfig, Sampling
from src.generation.decode import decode, evaluating, generate, pad_left
from src.generation.sampling import filter_logits, next_token
from src.generation.text import TextStream, continue_texts
from src.model.cache import KVCache
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.tokenizer import encode, text_to_token_ids, token_ids_to_text


@pytest.fixture
def net(tiny):
    torch.manual_seed(0)
    return sharpened(GPT(tiny))


def sharpened(net: GPT) -> GPT:
    """With weights large enough that no two tokens are equally likely but for rounding."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)
    return net


@pytest.fixture(scope="module")
def reader():
    """A tiny model with GPT-2's vocabulary, padded by 47 tokens that do not exist."""
    torch.manual_seed(0)
    return sharpened(GPT(GPTConfig(vocab_size=50304, context_length=32, emb_dim=16, n_heads=2, n_layers=2)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uncached_greedy(net: GPT, tokens: torch.Tensor, count: int) -> torch.Tensor:
    with evaluating(net):
        for _ in range(count):
            window = tokens[:, -net.config.context_length :]
            tokens = torch.cat([tokens, net(window)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 16, 25])
def test_greedy_equals_the_uncached_computation_200_tokens_past_the_window(net, rows, length):
    tokens = torch.randint(net.config.vocab_size, (rows, length), generator=seeded())
    assert torch.equal(generate(net, tokens, 216), uncached_greedy(net, tokens, 216))


@pytest.mark.parametrize("rows", [1, 3])
def test_each_steps_logits_equal_the_uncached_ones(net, rows):
    tokens = torch.randint(net.config.vocab_size, (rows, 5), generator=seeded())
    text = tokens
    for step in decode(net, tokens, 40, Sampling(temperature=1.0), seeded()):
        with evaluating(net):
            expected = net(text[:, -16:])[:, -1]
        torch.testing.assert_close(step.logits, expected, atol=1e-5, rtol=0)
        text = torch.cat([text, step.tokens], dim=1)


def test_rows_of_different_length_get_what_they_would_get_alone(net):
    rows = [torch.randint(net.config.vocab_size, (length,), generator=seeded(length)) for length in (1, 9, 23, 16)]
    tokens, padding = pad_left(rows)
    together = generate(net, tokens, 30, padding=padding)
    penalised = generate(net, tokens, 30, Sampling(repetition_penalty=1.7), padding=padding)
    for row, new, new_penalised in zip(rows, together[:, 23:], penalised[:, 23:], strict=True):
        assert torch.equal(new, generate(net, row[None], 30)[0, len(row) :])
        alone = generate(net, row[None], 30, Sampling(repetition_penalty=1.7))
        assert torch.equal(new_penalised, alone[0, len(row) :])
    beams = beam_search(net, tokens, 25, padding=padding)
    for row, found in zip(rows, beams, strict=True):
        (alone,) = beam_search(net, row[None], 25)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_samples": 4}])
def test_nothing_is_read_twice_within_the_window(net, monkeypatch, options):
    read, states = [], net.hidden_states
    monkeypatch.setattr(
        net, "hidden_states", lambda tokens, cache: read.append(tuple(tokens.shape)) or states(tokens, cache)
    )
    rows = options.get("num_samples", 1)
    generate(net, torch.zeros(1, 5, dtype=torch.int64), 12, **options)
    assert read == [(1, 5)] + [(rows, 1)] * 11
    read.clear()
    beam_search(net, torch.zeros(2, 5, dtype=torch.int64), 12, num_beams=3)
    assert read == [(2, 5)] + [(6, 1)] * 11


@pytest.mark.parametrize("enabled", [True, False])
def test_decoding_never_uses_cudnns_attention_and_evaluation_may(net, monkeypatch, enabled):
    tokens, states, seen = torch.zeros(1, 5, dtype=torch.int64), net.hidden_states, []

    def watched(tokens, cache=None):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return states(tokens, cache)

    monkeypatch.setattr(net, "hidden_states", watched)
    try:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        for _ in decode(net, tokens, 3):
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        beam_search(net, tokens, 3)
        assert seen == [False] * 6
        with evaluating(net):
            net(tokens)
        assert seen[-1] == torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_own_generator_decides_and_mode_and_gradients_are_given_back(net):
    tokens = torch.zeros(2, 3, dtype=torch.int64)

    def sample(seed):
        return generate(net, tokens, 10, Sampling(temperature=1.5), seeded(seed))

    state = torch.get_rng_state()
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    net.blocks[1].eval()
    for _ in decode(net, tokens, 3):
        assert net.training
        assert not net.blocks[1].training
        assert torch.is_grad_enabled()
    beam_search(net, tokens, 3)
    assert net.training
    assert not net.blocks[1].training
    net(sample(1)).sum().backward()  # what was generated can be trained on
    assert net.head.weight.grad is not None


def test_books_filter_and_draw():
    """The book's generate_text: its logits, its top-k, its temperature, its draw."""
    logits = torch.randn(8, 300, generator=seeded())
    top = torch.topk(logits, 25).values[:, -1:]
    expected = torch.softmax(logits.masked_fill(logits < top, float("-inf")) / 1.4, dim=-1)
    sampling = Sampling(temperature=1.4, top_k=25)
    torch.testing.assert_close(filter_logits(logits, sampling).softmax(-1), expected, atol=1e-7, rtol=0)
    drawn = torch.multinomial(expected, 1, generator=seeded(3))
    assert torch.equal(next_token(logits, sampling, seeded(3)), drawn)


def test_sampling_draws_from_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]])
    draws = next_token(logits.expand(20000, -1), Sampling(temperature=0.7, top_k=3), seeded()).flatten()
    kept = torch.tensor([2.0, 1.0, 5.0])
    expected = torch.zeros(5)
    expected[[0, 1, 4]] = torch.softmax(kept / 0.7, dim=0)
    frequency = draws.bincount(minlength=5) / 20000
    torch.testing.assert_close(frequency, expected, atol=0.005, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_choosing_a_token_neither_reads_from_a_gpu_nor_copies_to_it(temperature):
    sampling = Sampling(temperature=temperature, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    with FakeTensorMode(), Calls() as calls:  # of which reading a number would fail
        logits, seen = torch.zeros(2, 50, device="cuda"), torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        assert next_token(logits, sampling, seen=seen).device.type == "cuda"
    assert "aten::argmax" in calls.names and "aten::_to_copy" not in calls.names


@pytest.mark.parametrize(("deterministic", "place"), [(False, "cuda"), (True, "cpu")])
def test_where_top_p_sums(deterministic, place):
    """PyTorch's documentation of ``use_deterministic_algorithms``: a cumulative sum of floats on a GPU raises."""
    places = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "aten::cumsum":
                places.append(args[0].device.type)
            return func(*args, **kwargs or {})

    torch.use_deterministic_algorithms(deterministic)
    try:
        with FakeTensorMode(), Sums():
            logits = filter_logits(torch.zeros(2, 50, device="cuda"), Sampling(temperature=1.0, top_p=0.9))
        assert places == [place] and logits.device.type == "cuda"
    finally:
        torch.use_deterministic_algorithms(False)


def test_each_row_may_have_its_own_temperature(net):
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    temperatures = torch.tensor([[0.0], [2.0], [0.0]])
    sampling = Sampling(top_k=50).model_copy(update={"temperature": temperatures})
    rows = generate(net, tokens, 12, sampling, seeded())
    greedy = generate(net, tokens[:1], 12)[0]
    assert torch.equal(rows[0], greedy)
    assert torch.equal(rows[2], greedy)
    assert not torch.equal(rows[1], greedy)


ALL = [{"top_k": None}, {"top_k": 0}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 1.0}, {"min_p": 0.0},
       {"repetition_penalty": 1.0}]  # fmt: skip


@pytest.mark.parametrize("options", ALL)
def test_settings_that_keep_all(options):
    logits = torch.randn(50, 5, generator=seeded())
    seen = torch.zeros(50, 2, dtype=torch.int64)
    all_kept = next_token(logits, Sampling(temperature=1.0), seeded(), seen)
    assert torch.equal(next_token(logits, Sampling(temperature=1.0, **options), seeded(), seen), all_kept)


@given(st.integers(0, 2**32), st.floats(1e-6, 1), st.floats(0, 1), st.integers(0, 40), st.floats(0.05, 20))
def test_the_likeliest_always_stays_and_probabilities_sum_to_one(seed, top_p, min_p, top_k, temperature):
    logits = 5 * torch.randn(3, 30, generator=seeded(seed))
    left = filter_logits(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)).softmax(-1)
    assert left.isfinite().all()
    assert torch.equal(left.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(left.sum(-1), torch.ones(3))


def test_temperature_0_is_greedy_whatever_else_is_set(net):
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    sampling = Sampling(temperature=0, top_k=5, top_p=0.5, min_p=0.1)
    assert torch.equal(generate(net, tokens, 9, sampling, seeded()), generate(net, tokens, 9))


WRONG = {
    "temperature": -1, "top_k": -2, "top_p": 0, "min_p": 1.5, "repetition_penalty": 0, "max_new_tokens": 0,
    "num_samples": 0, "num_beams": 0, "length_penalty": float("nan"), "seed": -1,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-6, 1e30])
def test_temperatures_at_the_edge_of_float32(temperature):
    logits = 30 * torch.randn(20, 50, generator=seeded())
    drawn = next_token(logits, Sampling(temperature=temperature, top_p=0.9), seeded())
    if temperature < 1:
        assert torch.equal(drawn, logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize(("key", "value"), [("num_samples", 10**6), ("num_beams", 60_000)])
def test_more_than_memory_holds_is_refused_before_any_is_taken(key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value} must be at most [\d,]*; use {key}=") as error:
        GenerationConfig(temperature=0, num_beams=value) if key == "num_beams" else GenerationConfig(num_samples=value)
    cure = int(str(error.value).split("=")[-1])
    assert getattr(GenerationConfig(**{"temperature": 0, key: cure}), key) == cure


@pytest.mark.parametrize("key", WRONG)
def test_impossible_settings_are_told_with_their_cure(key):
    with pytest.raises(ValueError, match=rf"^{key}=.*; use {key}=") as error:
        GenerationConfig(**{key: WRONG[key]})
    assert "\n" not in str(error.value)


def test_beams_do_not_draw():
    with pytest.raises(ValueError, match="generation=beam"):
        GenerationConfig(num_beams=4, temperature=1.0)
    with pytest.raises(ValueError, match="num_beams=5"):
        GenerationConfig(temperature=0, num_beams=4, num_samples=5)


def test_an_empty_prompt_has_no_next_token(net):
    with pytest.raises(ValueError, match="empty prompt"):
        generate(net, torch.zeros(1, 0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="empty prompt"):
        beam_search(net, torch.zeros(2, 3, dtype=torch.int64), 1, padding=torch.tensor([0, 3]))


def test_end_of_text_ends_a_row(net):
    tokens = torch.randint(net.config.vocab_size, (3, 4), generator=seeded())
    endless = generate(net, tokens, 30, Sampling(temperature=1.0), seeded(5))
    end = endless[1, 4 + 3].item()  # some token that occurs
    ended = generate(net, tokens, 30, Sampling(temperature=1.0), seeded(5), end_token=end)
    for row, whole in zip(ended[:, 4:].tolist(), endless[:, 4:].tolist(), strict=True):
        at = whole.index(end) + 1 if end in whole else len(row)
        assert row[:at] == whole[:at]
        assert set(row[at:]) <= {end}


def exhaustive(net: GPT, prompt: torch.Tensor, length: int, penalty: float) -> list[tuple[float, list[int]]]:
    """Every continuation of ``length`` tokens with its score, the best first."""
    every = torch.tensor(list(itertools.product(range(net.config.vocab_size), repeat=length)))
    rows = torch.cat([prompt.expand(len(every), -1), every], dim=1)
    with evaluating(net):
        steps = net(rows[:, :-1])[:, prompt.shape[1] - 1 :].log_softmax(-1)
    totals = steps.gather(-1, every.unsqueeze(-1)).sum((1, 2)) / length**penalty
    order = totals.argsort(descending=True)
    return [(totals[at].item(), every[at].tolist()) for at in order]


def test_wide_beam_search_finds_the_best_of_all():
    torch.manual_seed(1)
    net = sharpened(GPT(GPTConfig(vocab_size=6, context_length=8, emb_dim=8, n_heads=2, n_layers=1)))
    prompt = torch.tensor([[3, 1]])
    best = exhaustive(net, prompt, 4, 0.7)
    (found,) = beam_search(net, prompt, 4, num_beams=216, length_penalty=0.7)
    assert [hypothesis.tokens.tolist() for hypothesis in found[:20]] == [tokens for _, tokens in best[:20]]
    assert [hypothesis.score for hypothesis in found[:20]] == pytest.approx([score for score, _ in best[:20]], abs=1e-5)


@pytest.mark.parametrize("end_token", [None, 7])
def test_a_single_beam_is_greedy(net, end_token):
    tokens = torch.randint(net.config.vocab_size, (5, 6), generator=seeded())
    greedy = generate(net, tokens, 40)
    end_token = end_token and greedy[0, 6 + 4].item()
    greedy = generate(net, tokens, 40, end_token=end_token)
    for row, (found,) in zip(greedy, beam_search(net, tokens, 40, 1, end_token=end_token), strict=True):
        assert torch.equal(found.tokens, row[6 : 6 + len(found.tokens)])
        assert len(found.tokens) == 40 or found.tokens[-1] == end_token


def test_padded_ids_are_never_chosen(reader):
    with torch.no_grad():
        boosted = GPT(reader.config)
        boosted.load_state_dict(reader.state_dict())
        boosted.head.weight[50257:] = 100 * boosted.head.weight[:47].abs()
        boosted.head.weight[50300] = -boosted.head.weight[50299]
    tokens = torch.tensor([[1, 2, 3]])
    assert generate(boosted, tokens, 20).max() >= 50257
    for sampling in (
        Sampling(),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=2.0, min_p=0.01),
    ):
        assert generate(boosted, tokens, 20, sampling, seeded(), vocab_size=50257).max() < 50257
    for hypothesis in beam_search(boosted, tokens, 20, vocab_size=50257)[0]:
        assert hypothesis.tokens.max() < 50257


@settings(deadline=None)  # the first example reads the tokenizer
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_text_up_to_the_first_stop(text, stop):
    tokens = encode(text, special_tokens="text").tolist()
    stream, pieces = TextStream(stop), []
    for token in tokens:
        if stream.stopped:
            break
        pieces.append(stream.push(token))
    pieces.append(stream.finish())
    whole = token_ids_to_text(torch.tensor(tokens, dtype=torch.int64))
    first = min((at for one in stop if (at := whole.find(one)) >= 0), default=len(whole))
    # a stop string that completes with an earlier token wins over one that begins earlier and completes later
    assert whole.startswith("".join(pieces))
    assert "".join(pieces) == whole[:first] or (len(stop) > 1 and stream.stopped)
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=40), st.data())
def test_a_stop_string_of_any_length_is_found_however_it_is_cut(text, data):
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = text[begin : data.draw(st.integers(begin + 1, len(text)))]
    letters = tiktoken.Encoding(
        "letters", pat_str=r"[\s\S]", mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )  # fmt: skip
    for tokenizer in None, letters:  # many bytes to a token, and one
        stream, shown = TextStream([stop], tokenizer), ""
        for token in encode(text, tokenizer, "text").tolist():
            shown += stream.push(token)
            assert stop not in shown
        assert stream.stopped
        assert shown + stream.finish() == text[: text.index(stop)]


def test_half_a_character_is_never_shown():
    stream = TextStream()
    tokens = encode("👩‍🚀 жук").tolist()
    assert len(tokens) > 8
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == "👩‍🚀 жук"
    assert "" in pieces
    half = TextStream()
    assert half.push(encode("👩").tolist()[0]) == ""
    assert half.finish() == "\ufffd"


def test_texts_of_any_length_together(reader):
    prompts = ["Every effort", "", "Жук 🚀, " * 10, "a"]
    config = GenerationConfig(temperature=0, max_new_tokens=8)
    together = continue_texts(reader, prompts, config)
    for prompt, (continuation,) in zip(prompts, together, strict=True):
        tokens = text_to_token_ids(prompt or "<|endoftext|>")
        expected = generate(reader, tokens, 8, vocab_size=50257, end_token=50256)[0, tokens.shape[1] :]
        assert continuation.tokens == expected.tolist()[: len(continuation.tokens)]
        assert len(continuation.tokens) == 8 or continuation.tokens[-1] == 50256


def test_more_prompts_than_fit_together(reader, monkeypatch):
    prompts = [f"{number} and" for number in range(7)]
    config = GenerationConfig(max_new_tokens=3, num_samples=2)
    whole = continue_texts(reader, prompts, config)
    monkeypatch.setattr("src.generation.text.ROWS", 4)
    assert continue_texts(reader, prompts, config) == whole
    assert [len(samples) for samples in whole] == [2] * 7


def test_a_prompt_is_continued_the_same_whatever_stands_beside_it(reader):
    """In one batch or several; and as a single prompt always was, by PyTorch's generator of that seed."""
    config = GenerationConfig(max_new_tokens=6, num_samples=2, seed=5)
    alone = continue_texts(reader, ["Every effort"], config)
    assert continue_texts(reader, ["Every effort", "Жук 🚀, " * 10, "a"], config)[:1] == alone
    assert continue_texts(reader, ["Every effort", *map(str, range(40))], config)[:1] == alone
    prompts = ["a", "b", "Every effort"]
    together = continue_texts(reader, prompts, config)
    for number, prompt in enumerate(prompts):
        assert continue_texts(reader, [prompt], config, first=number) == [together[number]]
    tokens = text_to_token_ids("Every effort")
    options = {"num_samples": 2, "vocab_size": 50257, "end_token": 50256}
    rows = generate(reader, tokens, 6, config, seeded(5), **options)[:, tokens.shape[1] :]
    assert [sample.tokens for sample in alone[0]] == rows.tolist()


def test_no_two_texts_share_their_noise(reader):
    """Where all tokens are equally likely, what is drawn is the noise alone."""
    level = GPT(reader.config)
    with torch.no_grad():
        level.head.weight.zero_()
    config = GenerationConfig(max_new_tokens=8, num_samples=35, top_k=None)
    found = continue_texts(level, ["a", "b", "c and d"], config)
    found += continue_texts(level, ["a"], config, first=3)
    found += continue_texts(level, ["a"], GenerationConfig(max_new_tokens=8, num_samples=35, top_k=None, seed=124))
    texts = [tuple(sample.tokens) for samples in found for sample in samples]
    assert len(set(texts)) == len(texts) == 5 * 35


def test_any_number_of_samples_takes_no_more_memory(reader, monkeypatch):
    read, states = set(), reader.hidden_states
    monkeypatch.setattr(
        reader, "hidden_states", lambda tokens, cache: read.add(len(tokens)) or states(tokens, cache), raising=True
    )
    (samples,) = continue_texts(reader, ["So"], GenerationConfig(max_new_tokens=2, num_samples=70))
    assert read == {1, 32, 6}
    assert len(samples) == 70
    assert len({tuple(sample.tokens) for sample in samples}) > 32


@pytest.mark.parametrize("way", [{}, {"temperature": 0}, {"temperature": 0, "num_beams": 3}, {"num_samples": 2}])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_logits_that_are_not_finite_are_told(reader, way, value):
    """From the first token, and from a later one, past the text that it was preceded by."""
    broken, said = GPT(reader.config), []
    broken.load_state_dict(reader.state_dict())
    with torch.no_grad():
        broken.pos_emb.weight[3] = value
    for prompt, tokens in ("a b c d e f g", 0), ("a", 3):
        said.clear()
        with pytest.raises(ValueError, match=r"logits are not finite, .*; use weights=") as error:
            continue_texts(broken, [prompt], GenerationConfig(**way), on_text=said.append)
        assert "\n" not in str(error.value)
        if way.get("num_beams", 1) == 1:
            assert len(said) == tokens


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings_end_the_text_before_them(reader, beams):
    config = GenerationConfig(temperature=0, max_new_tokens=20, num_beams=beams)
    ((whole,),) = continue_texts(reader, ["So"], config)
    stop = whole.text[9:14]
    ((stopped,),) = continue_texts(reader, ["So"], config, stop=["never there", stop])
    if beams == 1:
        assert stopped.text == whole.text[: whole.text.find(stop)]
    assert stop not in stopped.text
    assert len(stopped.tokens) < 20


def test_pieces_of_a_single_text_arrive_as_they_become_certain(reader):
    pieces, steps = [], []
    config = GenerationConfig(max_new_tokens=12, temperature=1.0)
    ((one,),) = continue_texts(reader, ["So"], config, on_text=pieces.append, on_step=steps.append)
    assert "".join(pieces) == one.text
    assert len(pieces) == len(steps) + 1 == 13


def test_beams_come_with_scores_best_first(reader):
    config = GenerationConfig(temperature=0, max_new_tokens=6, num_beams=4, num_samples=3)
    (found,) = continue_texts(reader, ["So"], config)
    scores = [one.score for one in found]
    assert len(set(scores)) == 3
    assert scores == sorted(scores, reverse=True)
    tokens = torch.cat([text_to_token_ids("So"), torch.tensor([found[0].tokens])], dim=1)
    with evaluating(reader):
        log_probabilities = reader(tokens)[0, :-1, :50257].log_softmax(-1)
    likelihood = sum(log_probabilities[at, token].item() for at, token in enumerate(tokens[0, 1:].tolist()))
    likelihood -= sum(
        log_probabilities[at, token].item() for at, token in enumerate(tokens[0, 1 : -len(found[0].tokens)].tolist())
    )
    assert math.isclose(likelihood / len(found[0].tokens), scores[0], abs_tol=1e-4)


def test_a_vocabulary_too_small_is_told(net):
    with pytest.raises(ValueError, match="101 tokens"):
        continue_texts(net, ["So"], GenerationConfig())


def test_a_fixed_cache_computes_the_same(small_net):
    """What a CUDA graph records: shapes that do not depend on how much was read."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 50257, (3, 30))
    plain, fixed = (KVCache(small_net.config, 3) for _ in range(2))
    for kept in fixed._keys + fixed._values:
        kept.fill_(float("nan"))  # as memory that nobody has written to may be
    with torch.no_grad():
        for cache in plain, fixed:
            small_net(tokens[:, :5], cache)
        fixed.fix()
        for place in range(5, 30):
            if place == 20:  # as after a recording
                small_net(tokens[:, :1], fixed)
                fixed.rewind(20)
            expected, found = (small_net(tokens[:, place : place + 1], cache) for cache in (plain, fixed))
            assert torch.allclose(found, expected, atol=1e-4)
        assert fixed.length == plain.length == 30
        shapes = {tuple(tensor.shape) for tensor in fixed.append(0, *torch.zeros(2, 3, 4, 1, 8))}
        assert shapes == {(3, 4, 32, 8)}
