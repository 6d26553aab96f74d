"""The likeliest tokens of each step of decoding, printed."""

import sys

import tiktoken

from src.generation.decode import Step
from src.tokenizer import token_bytes

LIKELIEST = 10


class Inspection:
    """Prints to stderr the likeliest tokens of each step of a single text with their probabilities before any filter,
    and marks the chosen one with a ``*``."""

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        self.tokenizer = tokenizer
        self.steps = 0

    def __call__(self, step: Step) -> None:
        self.steps += 1
        best = step.logits[0].softmax(dim=-1).topk(min(LIKELIEST, step.logits.shape[-1]))
        chosen = int(step.tokens[0])
        print(f"-- token {self.steps}: {self._shown(chosen)}", file=sys.stderr)
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            mark = "*" if token == chosen else " "
            print(f"{mark} {probability:8.3%}  {token:>5}  {self._shown(token)}", file=sys.stderr)

    def _shown(self, token: int) -> str:
        return repr(token_bytes(token, self.tokenizer).decode(errors="backslashreplace"))
