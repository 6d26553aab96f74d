"""Continue texts: ``python -m src.generate weights=<x> prompt=<text> [overrides]``. See ``conf/generate.yaml``."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src import cli
from src.generation.config import DEVICES, GenerationConfig
from src.interop.locate import problems_of_weights
from src.resume import as_meant, data_of_run, with_latest_weights

if TYPE_CHECKING:
    from src.generation.decode import Step
    from src.model.gpt import GPT

RAW = ("prompt", "prompt_file", "stop")  # taken to the letter, past Hydra
LIKELIEST = 10


@dataclass(frozen=True)
class GenerateConfig(GenerationConfig):
    """The keys of ``conf/generate.yaml``."""

    weights: str = "gpt2"
    special_tokens: str = "parse"
    echo: bool = True
    inspect: bool = False
    device: str = "auto"
    precision: str = "32-true"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.special_tokens not in ("parse", "text"):
            found.append(f"special_tokens={self.special_tokens} is neither parse nor text: special_tokens=parse")
        if self.device not in DEVICES:
            found.append(f"device={self.device} is none of {', '.join(DEVICES)}: device=auto")
        if self.precision not in ("32-true", "bf16-true"):
            found.append(f"precision={self.precision} is neither 32-true nor bf16-true: precision=32-true")
        if self.inspect and (self.num_beams > 1 or self.num_samples > 1):
            found.append("inspect=true looks at a single text: num_samples=1 num_beams=1")
        return found


def find_problems(cfg: DictConfig, raw: dict[str, list[str]] | None = None) -> list[str]:
    """Everything wrong with ``cfg`` and the ``raw`` arguments that can be known without reading the weights."""
    checked, found = cli.check_sections(cfg, {"": GenerateConfig})
    raw = raw or dict.fromkeys(RAW, ())
    if checked:
        found += problems_of_weights(checked[""].weights)
    for file in raw["prompt_file"]:
        try:
            _read(Path(file))
        except ValueError as error:
            found.append(str(error))
    texts = len(raw["prompt"]) + len(raw["prompt_file"])
    if checked and checked[""].inspect and texts != 1:
        found.append(f"inspect=true looks at a single text, not at {texts}: give one prompt")
    if not texts and not (sys.stdin and sys.stdin.isatty()):
        found.append(
            "prompt is needed where there is no terminal to ask for it: prompt=<text>, or prompt=- to read stdin"
        )
    return found


def generate(cfg: DictConfig, raw: dict[str, list[str]]) -> None:
    """Write the continuations of all prompts to stdout, or ask for prompts on a terminal.

    Raises:
        ValueError: the problems of the config; weights that cannot be read; a prompt that is not UTF-8.
    """
    if problems := find_problems(cfg, raw):
        raise ValueError("\n".join(problems))
    import torch

    from src.generation.text import check_vocabulary
    from src.interop.weights import load_weights
    from src.tokenizer import gpt2_tokenizer
    from src.training.device import pick_accelerator

    config = GenerateConfig(**{field.name: cfg[field.name] for field in fields(GenerateConfig)})
    prompts = [
        *(_stdin() if text == "-" else text for text in raw["prompt"]),
        *map(_read, map(Path, raw["prompt_file"])),
    ]
    dtype = torch.bfloat16 if config.precision == "bf16-true" else torch.float32
    net = load_weights(config.weights, pick_accelerator(config.device, "device"), dtype=dtype)
    net.pack()
    check_vocabulary(net, gpt2_tokenizer())
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        if prompts:
            _write(net, prompts, config, raw["stop"])
        else:
            _converse(net, config, raw["stop"])
    except BrokenPipeError:  # whoever read our texts has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(net: GPT, prompts: list[str], config: GenerateConfig, stop: list[str]) -> None:
    from src.generation.text import continue_texts

    alone = len(prompts) == config.num_samples == config.num_beams == 1
    streamed = alone and not config.inspect
    if streamed:
        _say(prompts[0] if config.echo else "")
    found = continue_texts(
        net,
        prompts,
        config,
        stop,
        special_tokens=config.special_tokens,
        on_text=_say if streamed else None,
        on_step=_Inspection() if config.inspect else None,
    )
    if streamed:
        _say("\n")
        return
    for number, (prompt, samples) in enumerate(zip(prompts, found, strict=True)):
        for sample, continuation in enumerate(samples):
            if not alone:
                score = "" if continuation.score is None else f", score {continuation.score:.4f}"
                print(f"-- prompt {number + 1}, text {sample + 1}{score}", file=sys.stderr, flush=True)
            _say((prompt if config.echo else "") + continuation.text + "\n")


def _converse(net: GPT, config: GenerateConfig, stop: list[str]) -> None:
    """A prompt per line until the end of the input; the seed moves on with each."""
    print("a text to continue, or Ctrl-D", file=sys.stderr)
    for turn in range(sys.maxsize):
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        _write(net, [line.removesuffix("\n")], replace(config, seed=config.seed + turn), stop)


class _Inspection:
    """Prints the likeliest tokens of each step, the model's own probabilities, before any filter."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, step: Step) -> None:
        from src.tokenizer import token_bytes

        self.steps += 1
        best = step.logits[0].softmax(dim=-1).topk(LIKELIEST)
        chosen = step.tokens[0].item()
        print(f"-- token {self.steps}: {_shown(token_bytes(chosen))}", file=sys.stderr)
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            mark = "*" if token == chosen else " "
            print(f"{mark} {probability:8.3%}  {token:>5}  {_shown(token_bytes(token))}", file=sys.stderr)


def _shown(token: bytes) -> str:
    return repr(token.decode(errors="backslashreplace"))


def _say(text: str) -> None:
    print(text, end="", flush=True)


@functools.cache  # what comes through a pipe comes once
def _stdin() -> str:
    return _decoded(sys.stdin.buffer.read() if sys.stdin else b"", "prompt=-")


@functools.cache
def _read(file: Path) -> str:
    try:
        return _decoded(Path(os.path.expanduser(file)).read_bytes(), f"prompt_file={file}")
    except OSError as error:
        raise ValueError(f"prompt_file={file} cannot be read ({error.strerror}): prompt_file=<a text file>") from None


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8, see byte {error.start}: convert it, for instance with iconv -t UTF-8"
        ) from None


def with_special_tokens_of_run(overrides: list[str]) -> list[str]:
    """``overrides``, and what the run of the ``weights`` made of a literal <|endoftext|>, if they do not say."""
    _, values = cli.take_out(overrides, ("weights", "special_tokens"))
    if values["special_tokens"] or not values["weights"]:
        return overrides
    own = data_of_run(as_meant(values["weights"][-1])).get("special_tokens")
    return [*overrides, "special_tokens=text"] if own == "text" else overrides


def main() -> None:
    raw: dict[str, list[str]] = {}

    def rewrite(arguments: list[str]) -> list[str]:
        left, taken = cli.take_out(arguments, RAW)
        raw.update(taken)
        return with_special_tokens_of_run(with_latest_weights(left))

    cli.launch("generate", lambda cfg: generate(cfg, raw), lambda cfg: find_problems(cfg, raw), rewrite)


if __name__ == "__main__":
    main()
