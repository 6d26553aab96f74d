"""Beam search: continuations that are likely as a whole instead of token by token."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from src.generation.decode import Context, evaluating
from src.generation.sampling import penalise_repetition
from src.model.gpt import GPT


class Hypothesis(NamedTuple):
    """A continuation ``tokens`` ``(N,)``, end-of-text included; its ``score`` is its log-probability divided by
    ``N ** length_penalty``."""

    score: float
    tokens: Tensor


def beam_search(
    net: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    *,
    padding: Tensor | None = None,
    vocab_size: int | None = None,
    end_token: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
) -> list[list[Hypothesis]]:
    """At most ``num_beams`` hypotheses for each of ``tokens`` ``(P, T)``, best first.

    At each step the ``num_beams`` likeliest unfinished continuations of a prompt are extended. One that ends among the
    ``num_beams`` likeliest is kept with its score (see :func:`~src.generation.decode.decode` for ``end_token``,
    ``stop``, ``padding`` and ``vocab_size``). The search ends when ``num_beams`` are kept and the likeliest unfinished
    one, at its present length, scores no better than the worst of them, as with Hugging Face's
    ``early_stopping=False``. A single beam stops at its first end, and is greedy decoding. ``length_penalty`` above 0
    favors long hypotheses (Wu et al. 2016, section 7, use another formula).

    Raises:
        ValueError: an empty prompt; logits that are not finite.
    """
    P, K = len(tokens), num_beams
    finished: list[list[Hypothesis]] = [[] for _ in range(P)]
    open_prompts = set(range(P))
    with evaluating(net):
        context = Context(net, tokens, padding, vocab_size)
        logits = context.next_logits()
        rows = torch.arange(P, device=tokens.device).repeat_interleave(K)
        context.select(rows)
        scores = torch.full((P, K), float("-inf"), device=tokens.device)
        scores[:, 0] = 0.0  # all beams are still the same
        for length in range(1, max_new_tokens + 1):
            logits = logits[rows] if length == 1 else context.next_logits()  # (P * K, V)
            steps = penalise_repetition(logits.log_softmax(dim=-1), repetition_penalty, context.tokens)
            totals = (steps.view(P, K, -1) + scores.unsqueeze(-1)).flatten(1)  # (P, K * V)
            best, at = totals.topk(min(2 * K, totals.shape[1]), dim=1)  # (P, 2K): at least K of them do not end
            parents = at // logits.shape[-1] + torch.arange(0, P * K, K, device=at.device).unsqueeze(1)
            new = at % logits.shape[-1]
            written = context.tokens[parents, tokens.shape[1] :]  # (P, 2K, length - 1)
            written = torch.cat([written, new.unsqueeze(-1)], dim=-1)  # (P, 2K, length)
            ends = torch.zeros_like(new, dtype=torch.bool) if end_token is None else new == end_token
            if stop is not None:
                ends = ends | stop(written.flatten(0, 1)).view_as(ends)
            if length == max_new_tokens:
                ends = torch.ones_like(ends)
            unfinished = best.masked_fill(ends, float("-inf"))
            scores, chosen = unfinished.topk(K, dim=1)  # (P, K)
            for prompt in sorted(open_prompts):
                kept = finished[prompt]
                for rank in (ends[prompt, :K] & best[prompt, :K].isfinite()).nonzero().flatten().tolist():
                    score = best[prompt, rank].item() / length**length_penalty
                    kept.append(Hypothesis(score, written[prompt, rank]))
                kept.sort(key=lambda hypothesis: -hypothesis.score)
                del kept[K:]
                hope = scores[prompt, 0].item() / length**length_penalty
                if hope == float("-inf") or (len(kept) == K and (K == 1 or hope <= kept[-1].score)):
                    open_prompts.remove(prompt)
            if not open_prompts or length == max_new_tokens:
                return finished
            context.select(parents.gather(1, chosen).flatten())
            context.append(new.gather(1, chosen).view(-1, 1))
    return finished
