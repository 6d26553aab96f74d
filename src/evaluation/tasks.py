"""Tasks that ask for the likeliest continuation: the last word of a passage (LAMBADA, Paperno et al. 2016), and the
right one of several endings (HellaSwag, Zellers et al. 2019). Prompts and normalisations are those of EleutherAI's
lm-evaluation-harness, so that figures compare."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch

from src.generation.decode import evaluating
from src.model.gpt import GPT
from src.tokenizer import encode

Progress = Callable[[int], None]


class Likelihood(NamedTuple):
    """Log-probability in nats of a continuation, and whether each of its tokens was the likeliest."""

    log_probability: float
    greedy: bool


def likelihoods(
    net: GPT,
    pairs: list[tuple[str, str]],
    tokenizer: tiktoken.Encoding,
    batch_size: int = 8,
    progress: Progress = lambda done: None,
) -> list[Likelihood]:
    """How likely each second text is after the first. Context is cut on the left to what the model can see.

    Raises:
        ValueError: a continuation longer than ``context_length``, or an empty one.
    """
    rows = [_row(*pair, tokenizer, net.config.context_length) for pair in pairs]
    order = sorted(range(len(rows)), key=lambda at: -len(rows[at][0]))
    found: list[Any] = [None] * len(rows)
    device = net.tok_emb.weight.device
    with evaluating(net):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            longest = len(rows[chosen[0]][0])
            behind = [[0] * (longest - len(rows[at][0])) for at in chosen]  # nothing attends to it
            padded = [rows[at][0] + zeros for at, zeros in zip(chosen, behind, strict=True)]
            tokens = torch.tensor(padded, device=device)  # (B, T + 1)
            logits = net(tokens[:, :-1])  # (B, T, V)
            for row, at in enumerate(chosen):
                whole, count = rows[at]
                span = slice(len(whole) - 1 - count, len(whole) - 1)
                targets = tokens[row, 1:][span]
                steps = logits[row, span].float().log_softmax(dim=-1)  # (count, V)
                scores = steps.gather(-1, targets.unsqueeze(-1))
                found[at] = Likelihood(scores.sum().item(), bool((steps.argmax(-1) == targets).all()))
            progress(len(chosen))
    return found


def _row(context: str, continuation: str, tokenizer: tiktoken.Encoding, window: int) -> tuple[list[int], int]:
    """The tokens of both, as many as the model can see, and how many of them continue."""
    moved = len(context) - len(context.rstrip())  # a space belongs to the word behind it
    context, continuation = context[: len(context) - moved], context[len(context) - moved :] + continuation
    whole = encode(context + continuation, tokenizer, "text").tolist()
    before = len(encode(context, tokenizer, "text")) or 1
    whole = whole if context else [tokenizer.eot_token, *whole]
    count = len(whole) - before
    if not 0 < count <= window:
        raise ValueError(f"a continuation of {count} tokens, the model sees 1 to {window}: {continuation[:60]!r}")
    return whole[-window - 1 :], count


def check_lengths(key: str, examples: list, tokenizer: tiktoken.Encoding, window: int) -> None:
    """A ValueError where a passage's last word or an ending is longer than the ``window`` of the model."""
    pairs = [pair for one in examples for pair in (one.pairs() if isinstance(one, Question) else [one])]
    try:
        for pair in pairs:
            _row(*pair, tokenizer, window)
    except ValueError as error:
        raise ValueError(f"{key}: {error}: {key}=null or weights=<a model with more context>") from None


def read_passages(path: str) -> list[tuple[str, str]]:
    """Each passage of a LAMBADA file, ``{"text": ...}`` a line, without its last word, and that word.

    Raises:
        ValueError: a file that cannot be read, or a line of it.
    """
    passages = []
    for number, line in _lines(path, "lambada"):
        context, space, word = str(line.get("text") or "").rpartition(" ")
        if not space or not word:
            raise ValueError(f"lambada={path}: line {number} has no text of several words: lambada=<another file>")
        passages.append((context, f" {word}"))
    return passages


def lambada(
    net: GPT, passages: list[tuple[str, str]], tokenizer: tiktoken.Encoding, batch_size: int = 8, **options: Any
) -> dict[str, float]:
    """Accuracy of the last words, and their perplexity."""
    found = likelihoods(net, passages, tokenizer, batch_size, **options)
    mean = sum(one.log_probability for one in found) / len(found)
    accuracy = sum(one.greedy for one in found) / len(found)
    return {"accuracy": accuracy, "perplexity": math.exp(min(-mean, 700)), "passages": len(found)}


class Question(NamedTuple):
    context: str
    endings: list[str]
    label: int

    def pairs(self) -> list[tuple[str, str]]:
        return [(self.context, f" {ending}") for ending in self.endings]


def read_questions(path: str) -> list[Question]:
    """Each question of a file in HellaSwag's format, ``{"ctx": ..., "endings": [...], "label": n}`` a line.

    Raises:
        ValueError: a file that cannot be read, or a line of it.
    """
    questions = []
    for number, line in _lines(path, "multiple_choice"):
        try:
            question = _question(line)
            if not 0 <= question.label < len(question.endings) or not all(question.endings):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"multiple_choice={path}: line {number} has no ctx, endings and label in HellaSwag's format: "
                f"multiple_choice=<another file>"
            ) from None
        questions.append(question)
    return questions


def multiple_choice(
    net: GPT, questions: list[Question], tokenizer: tiktoken.Encoding, batch_size: int = 8, **options: Any
) -> dict[str, float]:
    """Share of questions whose right ending is the likeliest: ``accuracy`` by log-probability, ``accuracy_normalised``
    by log-probability per character."""
    pairs = [pair for question in questions for pair in question.pairs()]
    found = iter(likelihoods(net, pairs, tokenizer, batch_size, **options))
    right = normalised = 0
    for _, endings, label in questions:
        scores = [next(found).log_probability for _ in endings]
        per_character = [score / len(ending) for score, ending in zip(scores, endings, strict=True)]
        right += scores.index(max(scores)) == label
        normalised += per_character.index(max(per_character)) == label
    count = len(questions)
    return {"accuracy": right / count, "accuracy_normalised": normalised / count, "questions": count}


def _question(line: dict[str, Any]) -> Question:
    context = f"{line['ctx_a']} {line['ctx_b'].capitalize()}" if "ctx_a" in line else line["ctx"]
    if "activity_label" in line:
        context = f"{line['activity_label']}: {context}"
    if not isinstance(line["endings"], list):
        raise TypeError
    return Question(_tidy(context), [_tidy(ending) for ending in line["endings"]], int(line["label"]))


def _tidy(text: str) -> str:
    """HellaSwag's WikiHow part carries marks such as [title] and [step]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _lines(path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    cure, found, number = f"{key}=<a file of JSON lines>", 0, 0
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                content = json.loads(line)
                if not isinstance(content, dict):
                    raise ValueError(f"{key}={path}: line {number} is no JSON object: {cure}")
                found += 1
                yield number, content
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be read ({error.strerror}): {cure}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={path} is not UTF-8, see byte {error.start}: {cure}") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{key}={path}: line {number} is no JSON: {cure}") from None
    if not found:
        raise ValueError(f"{key}={path} is empty: {cure}")
