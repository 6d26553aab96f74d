"""Text in, text out: prompts of different lengths together, whole characters only, stop strings."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

from src.generation.beam import beam_search
from src.generation.config import GenerationConfig
from src.generation.decode import Step, decode, pad_left
from src.model.gpt import GPT
from src.tokenizer import gpt2_tokenizer, text_to_token_ids, token_bytes

ROWS = 32  # decoded together


class Continuation(NamedTuple):
    """What follows a prompt: its text without end-of-text and stop strings, its tokens with them, and the score of the
    hypothesis from a beam search."""

    text: str
    tokens: list[int]
    score: float | None = None


class TextStream:
    """Tokens in, text out as soon as it is final: never half a character, nor what may begin a stop string."""

    def __init__(self, stop: Sequence[str] = (), tokenizer: tiktoken.Encoding | None = None) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._tokenizer = tokenizer or gpt2_tokenizer()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        """The text that became final with ``token``."""
        if token == self._tokenizer.eot_token:
            self.stopped = True
        if self.stopped:
            return ""
        self._held += self._decoder.decode(token_bytes(token, self._tokenizer))
        return self._release(self._undecided())

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(0)

    def _undecided(self) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(text.startswith(self._held[-n:]) for text in self._stop)), 0)

    def _release(self, undecided: int) -> str:
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            self._decoder.reset()
            return text
        certain = len(self._held) - undecided
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def continue_texts(
    net: GPT,
    prompts: Sequence[str],
    config: GenerationConfig,
    stop: Sequence[str] = (),
    tokenizer: tiktoken.Encoding | None = None,
    special_tokens: str = "parse",
    on_text: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    first: int = 0,
) -> list[list[Continuation]]:
    """``config.num_samples`` continuations of each prompt, drawn, or found by beam search.

    Each ends with end-of-text, before the first of the ``stop`` strings, or after ``config.max_new_tokens``. An empty
    prompt stands for the beginning of a document, end-of-text. ``on_text`` receives the text of a single continuation
    as it becomes final; ``on_step`` receives each step of :func:`~src.generation.decode.decode`.

    Each prompt has its own generator, seeded with ``config.seed`` and its number, counted from ``first``, so that its
    continuations do not depend on the other prompts.

    Raises:
        ValueError: the model's vocabulary is smaller than the tokenizer's; its logits are not finite.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    check_vocabulary(net, tokenizer)
    device = net.tok_emb.weight.device
    rows = [text_to_token_ids(prompt, tokenizer, special_tokens).squeeze(0) for prompt in prompts]
    rows = [row if len(row) else torch.tensor([tokenizer.eot_token]) for row in rows]
    found: list[list[Continuation]] = []
    together = max(ROWS // max(config.num_samples, config.num_beams), 1)
    for begin in range(0, len(rows), together):
        tokens, padding = pad_left([row.to(device) for row in rows[begin : begin + together]])
        options = {
            "padding": padding,
            "vocab_size": tokenizer.n_vocab,
            "end_token": tokenizer.eot_token,
            "stop": _stopper(stop, tokenizer),
        }
        if config.num_beams > 1:
            beams = (config.num_beams, config.length_penalty, config.repetition_penalty)
            for hypotheses in beam_search(net, tokens, config.max_new_tokens, *beams, **options):
                best = hypotheses[: config.num_samples]
                found.append([_continuation(h.tokens.tolist(), stop, tokenizer, h.score) for h in best])
            continue
        generators = [_generator(config.seed, first + begin + number, device) for number in range(len(tokens))]
        samples: list[list[Continuation]] = [[] for _ in tokens]
        for left in range(config.num_samples, 0, -ROWS):
            steps, stream = [], TextStream(stop, tokenizer)
            options |= {"num_samples": min(left, ROWS), "cuda_graph": config.cuda_graph}
            for step in decode(net, tokens, config.max_new_tokens, config, generators, **options):
                steps.append(step.tokens.cpu())
                if on_step:
                    on_step(step)
                if on_text:
                    on_text(stream.push(int(step.tokens[0])))
            if on_text:
                on_text(stream.finish())
            for row, written in enumerate(torch.cat(steps, dim=1).tolist()):
                samples[row // min(left, ROWS)].append(_continuation(written, stop, tokenizer))
        found += samples
    return found


def _generator(seed: int, prompt: int, device: torch.device) -> torch.Generator:
    """The generator of ``prompt``; that of prompt 0 is seeded with ``seed`` itself."""
    state = np.random.SeedSequence([seed, prompt]).generate_state(1, np.uint64)[0] if prompt else seed
    return torch.Generator(device).manual_seed(int(state))


def check_vocabulary(net: GPT, tokenizer: tiktoken.Encoding) -> None:
    """Raise a ValueError if the model's vocabulary is smaller than the tokenizer's."""
    if net.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"the model has {net.config.vocab_size:,} tokens, the tokenizer {tokenizer.n_vocab:,}; "
            f"use weights=<a model of {tokenizer.n_vocab:,} tokens>"
        )


def _continuation(
    tokens: list[int], stop: Sequence[str], tokenizer: tiktoken.Encoding, score: float | None = None
) -> Continuation:
    stream, text, used = TextStream(stop, tokenizer), "", 0
    for token in tokens:
        text += stream.push(token)
        used += 1
        if stream.stopped:
            break
    return Continuation(text + stream.finish(), tokens[:used], score)


def _stopper(stop: Iterable[str], tokenizer: tiktoken.Encoding) -> Callable[[Tensor], Tensor] | None:
    """A function that tells whether the last token of each row ``(B, N)`` completes one of ``stop``; None if empty."""
    wanted = [text.encode(errors="surrogatepass") for text in stop if text]
    if not wanted:
        return None
    longest = max(map(len, wanted))  # a token is at least one byte

    def stops(tokens: Tensor) -> Tensor:
        ends = [b"".join(token_bytes(token, tokenizer) for token in row) for row in tokens[:, -longest:].tolist()]
        return torch.tensor([any(text in end for text in wanted) for end in ends], device=tokens.device)

    return stops
