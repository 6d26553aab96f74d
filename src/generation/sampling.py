"""One step of decoding: from the logits of the last position to the next token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src.generation.config import Sampling


def filter_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The logits ``(B, V)``, in float32, of the distribution to draw from; -inf for tokens that are left out.

    In this order: the repetition penalty on the tokens ``seen`` ``(B, L)`` (Keskar et al. 2019, section 4.1), the
    temperature, the ``top_k`` largest and their ties (Fan et al. 2018), the likeliest that together reach ``top_p``
    (Holtzman et al. 2020), and those at least ``min_p`` times as likely as the likeliest (Nguyen et al. 2024). The
    likeliest token always stays.
    """
    logits = penalise_repetition(logits.float(), sampling.repetition_penalty, seen)
    given: Any = sampling.temperature  # a number, or (B, 1) of each row; copying a number to a GPU would wait for it
    temperatures = given if isinstance(given, Tensor) else logits.new_full((), given)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # or a tiny temperature would overflow
    logits = logits / temperatures.masked_fill(temperatures == 0, 1.0)
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, tokens = logits.sort(dim=-1, descending=True)  # (B, V)
        probabilities = ordered.softmax(dim=-1)
        # PyTorch refuses a cumulative sum of floats on a GPU where algorithms have to be deterministic.
        place = "cpu" if torch.are_deterministic_algorithms_enabled() else logits.device
        reached = probabilities.to(place).cumsum(dim=-1).to(logits.device)
        left_out = reached - probabilities >= sampling.top_p  # the likelier ones already reach it
        logits = logits.masked_fill(left_out.scatter(-1, tokens, left_out), float("-inf"))
    if sampling.min_p:
        probabilities = logits.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)  # (B, 1)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    return logits


def penalise_repetition(logits: Tensor, penalty: float, seen: Tensor | None) -> Tensor:
    """``logits`` ``(B, V)`` with those of the tokens ``seen`` ``(B, L)`` divided by ``penalty``, or multiplied by it
    if they are negative."""
    if penalty == 1 or seen is None:
        return logits
    scores = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def next_token(
    logits: Tensor,
    sampling: Sampling | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """The next token of each row, ``(B, 1)`` int64, from its last logits ``(B, V)``: drawn with ``generator`` from the
    distribution of :func:`filter_logits`, or the likeliest at temperature 0. Several generators draw for equal,
    consecutive groups of rows."""
    sampling = sampling or Sampling()
    penalised = penalise_repetition(logits, sampling.repetition_penalty, seen)
    likeliest = penalised.argmax(dim=-1, keepdim=True)  # (B, 1)
    greedy = sampling.temperature == 0  # for all rows, or of each (B, 1)
    if not isinstance(greedy, Tensor) and greedy:
        return likeliest
    probabilities = filter_logits(logits, sampling, seen).softmax(dim=-1)
    generators = generator if isinstance(generator, Sequence) else [generator]
    shares = zip(probabilities.chunk(len(generators)), generators, strict=True)
    drawn = torch.cat([torch.multinomial(share, num_samples=1, generator=one) for share, one in shares])  # (B, 1)
    return torch.where(greedy, likeliest, drawn) if isinstance(greedy, Tensor) else drawn
