"""The decoding loop: the prompts are read once, then one token at a time with a cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from src.generation.config import Sampling
from src.generation.graph import StepGraph
from src.generation.sampling import next_token
from src.model.cache import KVCache
from src.model.gpt import GPT


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """A context without cuDNN's attention, which takes 23 to 37 ms to prepare for each new number of keys."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


class Context:
    """Rows of tokens, ``(B, L)``, and the cache of keys and values of those that the model has read.

    Beyond ``context_length`` the window slides: each further token is predicted from the last ``context_length``
    tokens. Since GPT-2's positions are absolute, a window that has moved is read again as a whole; before that no token
    is read twice.

    ``padding`` ``(B,)`` counts the tokens at the beginning of each row that do not belong to it. ``vocab_size`` is the
    number of tokens that may come next if the model's vocabulary is padded. ``cuda_graph`` records the reading of one
    token on a GPU.

    Raises:
        ValueError: an empty prompt.
    """

    def __init__(
        self,
        net: GPT,
        tokens: Tensor,
        padding: Tensor | None = None,
        vocab_size: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        if tokens.shape[1] == 0 or (padding is not None and padding.max() >= tokens.shape[1]):
            raise ValueError("an empty prompt has no next token; use the end-of-text token, 50256")
        self.net = net
        self.vocab_size = vocab_size or net.config.vocab_size
        if padding is not None:
            padded = torch.arange(tokens.shape[1], device=tokens.device) < padding.unsqueeze(1)  # (B, L)
            tokens = torch.where(
                padded, tokens.gather(1, padding.unsqueeze(1)), tokens
            )  # or the padding would count as seen
        self.tokens = tokens
        self._padding = padding
        self._unread = tokens
        self._recording = cuda_graph and tokens.is_cuda and padding is None
        self._graph: StepGraph | None = None
        weight = net.tok_emb.weight
        self._cache = KVCache(net.config, len(tokens), weight.device, weight.dtype, padding)

    @_without_cudnn()
    def next_logits(self) -> Tensor:
        """Read the unread tokens; the logits ``(B, V)`` of the next ones, in float32.

        Raises:
            ValueError: logits that are not finite, of which none is the largest.
        """
        window = self.net.config.context_length
        if self._cache.length + self._unread.shape[1] > window:
            left = max(self.tokens.shape[1] - window, 0)
            self._cache.rewind(0)
            self._unread = self.tokens[:, left:]
            if self._padding is not None:
                self._cache.padding = (self._padding - left).clamp(min=0)
        if self._recording and self._unread.shape[1] == 1:
            self._graph = self._graph or StepGraph(self.net, self._cache, self._unread)
            last = self._graph(self._unread)[:, -1]  # (B, C)
        else:
            last = self.net.hidden_states(self._unread, self._cache)[:, -1]  # (B, C)
        logits = self.net.head(last).float()[:, : self.vocab_size]  # (B, V)
        if not all(map(math.isfinite, torch.stack(logits.aminmax()).tolist())):
            raise ValueError("the model's logits are not finite, no token can be chosen; use weights=<other weights>")
        return logits

    def append(self, tokens: Tensor) -> None:
        """Add the next ``tokens`` ``(B, 1)``."""
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        self._unread = tokens

    def select(self, rows: Tensor) -> None:
        """Continue with ``rows`` ``(N,)``, which may repeat; nothing is read again."""
        self._cache.select(rows)
        if len(rows) != len(self.tokens):  # the tensors differ from the recorded ones
            self._graph = None
        self.tokens = self.tokens[rows]
        if self._padding is not None:
            self._padding = self._padding[rows]


class Step(NamedTuple):
    """One token for each of the rows: ``tokens`` ``(B, 1)`` and the logits ``(B, V)`` that they were chosen from."""

    tokens: Tensor
    logits: Tensor


class evaluating:
    """A context without dropout and gradients; on exit, every module returns to its mode."""

    def __init__(self, net: GPT) -> None:
        self._modules = list(net.modules())  # listed once, which takes longer than the loop over them

    def __enter__(self) -> None:
        self._training = [module for module in self._modules if module.training]
        for module in self._training:
            module.training = False
        self._no_grad = torch.no_grad()  # inference_mode's tensors could not be trained on
        self._no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(*error)
        for module in self._training:
            module.training = True


def decode(
    net: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    *,
    padding: Tensor | None = None,
    num_samples: int = 1,
    vocab_size: int | None = None,
    end_token: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    cuda_graph: bool = False,
) -> Iterator[Step]:
    """Continue each of ``tokens`` ``(P, T)`` ``num_samples`` times; yields a :class:`Step` of all
    B = P * num_samples rows per token.

    A row ends with ``end_token``, or when ``stop``, called with the new tokens ``(B, N)``, returns true for it
    ``(B,)``; after that it holds ``end_token`` (or 0). The prompts are read once for any ``num_samples``. There is one
    ``generator`` for all rows, or one per prompt. See :class:`Context` for ``padding``, ``vocab_size`` and
    ``cuda_graph``.

    Raises:
        ValueError: an empty prompt; logits that are not finite.
    """
    context = Context(net, tokens, padding, vocab_size, cuda_graph)
    ended = torch.zeros(len(tokens) * num_samples, dtype=torch.bool, device=tokens.device)
    without_dropout = evaluating(net)
    for step in range(max_new_tokens):
        with without_dropout:
            logits = context.next_logits()
            if step == 0 and num_samples > 1:
                rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(num_samples)
                context.select(rows)
                logits = logits[rows]
            new = next_token(logits, sampling, generator, context.tokens)  # (B, 1)
            new = new.masked_fill(ended.unsqueeze(1), end_token or 0)
            context.append(new)
        yield Step(new, logits)
        if end_token is not None:
            ended |= new.squeeze(1) == end_token
        if stop is not None:
            ended |= stop(context.tokens[:, tokens.shape[1] :])
        if (end_token is not None or stop is not None) and ended.all():
            return


def generate(
    net: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **options,
) -> Tensor:
    """``tokens`` ``(P, T)`` with their continuations by :func:`decode`, ``(P * num_samples, T + N)`` int64; N is
    ``max_new_tokens``, or less if all rows have ended. Takes the options of :func:`decode`."""
    rows = tokens.repeat_interleave(options.get("num_samples", 1), dim=0)
    steps = [step.tokens for step in decode(net, tokens, max_new_tokens, sampling, generator, **options)]
    return torch.cat([rows, *steps], dim=1)


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows ``(T_i,)`` of different lengths as one batch ``(B, max T)``, aligned at the end, and its padding ``(B,)``,
    or None if all have the same length."""
    longest = max(len(row) for row in rows)
    padding = torch.tensor([longest - len(row) for row in rows], device=rows[0].device)
    tokens = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return tokens, padding if padding.any() else None
