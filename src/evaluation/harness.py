"""A model as EleutherAI's lm-evaluation-harness (lm-eval) sees it: likelihoods of texts, and continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tiktoken
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from src.data.progress import progress
from src.generation.config import Sampling
from src.generation.decode import decode, evaluating, pad_left
from src.generation.text import TextStream
from src.model.gpt import GPT
from src.tokenizer import encode

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[Any, list[int], list[int]]  # a label that is not used here, the tokens of the context, those to score


class HarnessLM(TemplateLM):
    """``net`` as lm-eval wants to see a model, with the context handling of its ``HFLM``: what exceeds the model's
    context length is cut off on the left, and end-of-text stands for an empty context.

    Where a task samples, each request draws from a generator of its own, seeded by ``seed`` and the request's number.
    """

    def __init__(self, net: GPT, tokenizer: tiktoken.Encoding, batch_size: int = 8, seed: int = 0) -> None:
        super().__init__()
        self._net, self._encoding = net, tokenizer
        self._batch_size, self._seed = batch_size, seed
        self._device = net.tok_emb.weight.device

    @property
    def eot_token_id(self) -> int:
        return self._encoding.eot_token

    @property
    def max_length(self) -> int:
        return self._net.config.context_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode(string, self._encoding).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-probability in nats of each continuation after its context, and whether greedy decoding gives it.

        Raises:
            ValueError: a continuation that is empty, or longer than the model's context length.
        """
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability in nats of each whole text, in windows with as much context as the model can see."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text after each context, up to the first of the strings in ``until``."""
        asked: list[Any] = [request.args for request in requests]  # context, options
        groups: dict[str, list[int]] = {}  # requests with the same options, which can share a batch
        for number, (_, options) in enumerate(asked):
            groups.setdefault(repr(options), []).append(number)
        texts = [""] * len(requests)
        with progress("generating", len(requests), "texts") as advance:
            for group in groups.values():
                group.sort(key=lambda number: -len(asked[number][0]))
                for chosen in _batches(group, self._batch_size):
                    contexts = [asked[number][0] for number in chosen]
                    written = self._continue(contexts, asked[chosen[0]][1], chosen)
                    for number, text in zip(chosen, written, strict=True):
                        texts[number] = text
                    advance(len(chosen))
        return texts

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for _, _, continuation in requests:
            self._check(continuation)
        rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with evaluating(self._net), progress("scoring", len(rows), "likelihoods") as advance:
            for chosen in _batches(order, self._batch_size):
                counts = [len(requests[number][2]) for number in chosen]
                scores = self._score([rows[number] for number in chosen], counts)
                for number, score in zip(chosen, scores, strict=True):
                    found[number] = score
                advance(len(chosen))
        return found

    def _check(self, continuation: list[int]) -> None:
        if not 0 < len(continuation) <= self.max_length:
            text = self._encoding.decode(continuation)
            raise ValueError(
                f"tasks: the model's context_length={self.max_length} cannot hold a continuation of "
                f"{len(continuation)} tokens, {text[:60]!r}; use weights=<a model with more context>, or another task"
            )

    def _score(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """Of each row, the log-probability of its last so many tokens, and whether each of them is the likeliest."""
        longest = max(map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]  # at the end, where no token attends to it
        tokens = torch.tensor(padded, device=self._device)  # (B, T + 1)
        hidden = self._net.hidden_states(tokens[:, :-1])  # (B, T, C)
        found = []
        for row, (whole, count) in enumerate(zip(rows, counts, strict=True)):
            last = slice(len(whole) - 1 - count, len(whole) - 1)
            logits = self._net.head(hidden[row, last]).float()  # (count, V): a context needs none
            targets = tokens[row, 1:][last]  # (count,)
            likely = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum().item()
            found.append((likely, bool((logits.argmax(-1) == targets).all())))
        return found

    def _continue(self, contexts: list[str], options: dict[str, Any], numbers: list[int]) -> list[str]:
        options = dict(normalize_gen_kwargs(options))
        most = options["max_gen_toks"]
        longest = self.max_length - most if most < self.max_length else self.max_length  # else the window slides
        rows = [(self.tok_encode(context) or [self.eot_token_id])[-longest:] for context in contexts]
        tokens, padding = pad_left([torch.tensor(row, device=self._device) for row in rows])
        temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
        sampling = Sampling(temperature=temperature, top_k=options.get("top_k"), top_p=options.get("top_p"))
        generators = [torch.Generator(self._device).manual_seed(self._seed + number) for number in numbers]
        streams = [TextStream(options["until"], self._encoding) for _ in rows]
        texts = [""] * len(rows)
        steps = decode(
            self._net,
            tokens,
            most,
            sampling,
            generators,
            padding=padding,
            vocab_size=self._encoding.n_vocab,
            end_token=self.eot_token_id,
        )
        for step in steps:
            for row, token in enumerate(step.tokens.flatten().tolist()):
                texts[row] += streams[row].push(token)
            if all(stream.stopped for stream in streams):
                break
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def _batches(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]
