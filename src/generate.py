"""Continue texts: ``python -m src.generate weights=<x> prompt=<text> [overrides]``. See ``conf/generate.yaml``."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from omegaconf import DictConfig

from src.cli import app
from src.cli.resume import as_meant, data_of_run, with_latest_weights
from src.generation.config import DEVICES, GenerationConfig
from src.interop.locate import problems_of_weights

if TYPE_CHECKING:
    from src.generation.decode import Step
    from src.model.gpt import GPT

RAW = ("prompt", "prompt_file", "stop")  # taken to the letter, past Hydra
LIKELIEST = 10
LONGEST_PROMPT = 2**24  # bytes


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
    checked, found = app.check_sections(cfg, {"": GenerateConfig})
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
        ValueError: the problems of the config; weights that cannot be read, or that make logits that are not finite; a
            prompt that is not UTF-8; too little memory.
    """
    if problems := find_problems(cfg, raw):
        raise ValueError("\n".join(problems))
    import torch

    from src.device import is_out_of_memory, pick_accelerator
    from src.generation.text import check_vocabulary
    from src.interop.weights import load_weights
    from src.tokenizer import gpt2_tokenizer

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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        key = "num_beams" if config.num_beams > 1 else "num_samples"
        less = f"{key}={getattr(config, key) // 2}" if getattr(config, key) > 1 else "weights=<a smaller model>"
        raise ValueError(f"out of memory: {less}") from error


def _write(net: GPT, prompts: list[str], config: GenerateConfig, stop: list[str], first: int = 0) -> None:
    from src.generation.text import continue_texts

    alone = len(prompts) == config.num_samples == config.num_beams == 1
    streamed, begun = alone and not config.inspect, False

    def say(text: str) -> None:
        nonlocal begun
        _say(text if begun or not config.echo else prompts[0] + text)  # nothing where no token can be chosen
        begun = True

    try:
        found = continue_texts(
            net,
            prompts,
            config,
            stop,
            special_tokens=config.special_tokens,
            on_text=say if streamed else None,
            on_step=_Inspection() if config.inspect else None,
            first=first,
        )
    finally:
        if begun:
            _say("\n")
    if streamed:
        return
    for number, (prompt, samples) in enumerate(zip(prompts, found, strict=True)):
        for sample, continuation in enumerate(samples):
            if not alone:
                score = "" if continuation.score is None else f", score {continuation.score:.4f}"
                print(f"-- prompt {number + 1}, text {sample + 1}{score}", file=sys.stderr, flush=True)
            _say((prompt if config.echo else "") + continuation.text + "\n")


def _converse(net: GPT, config: GenerateConfig, stop: list[str]) -> None:
    """A prompt per line until the end of the input, each continued as that of its number on the command line."""
    print("a text to continue, or Ctrl-D", file=sys.stderr)
    for turn in range(sys.maxsize):
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        _write(net, [line.removesuffix("\n")], config, stop, first=turn)


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
    return _decoded(sys.stdin.buffer, "prompt=-") if sys.stdin else ""


@functools.cache
def _read(file: Path) -> str:
    try:
        with Path(os.path.expanduser(file)).open("rb") as content:
            return _decoded(content, f"prompt_file={file}")
    except OSError as error:
        raise ValueError(f"prompt_file={file} cannot be read ({error.strerror}): prompt_file=<a text file>") from None


def _decoded(file: BinaryIO, what: str) -> str:
    content = file.read(LONGEST_PROMPT + 1)  # no more, for a device never ends
    if len(content) > LONGEST_PROMPT:
        key = what.split("=")[0]
        raise ValueError(f"{what} has more than {LONGEST_PROMPT / 1e6:.0f} MB: {key}=<the end of it, which counts>")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8, see byte {error.start}: convert it, for instance with iconv -t UTF-8"
        ) from None


def with_special_tokens_of_run(overrides: list[str]) -> list[str]:
    """``overrides``, and what the run of the ``weights`` made of a literal <|endoftext|>, if they do not say."""
    _, values = app.take_out(overrides, ("weights", "special_tokens"))
    if values["special_tokens"] or not values["weights"]:
        return overrides
    own = data_of_run(as_meant(values["weights"][-1])).get("special_tokens")
    return [*overrides, "special_tokens=text"] if own == "text" else overrides


def main() -> None:
    raw: dict[str, list[str]] = {}

    def rewrite(arguments: list[str]) -> list[str]:
        left, taken = app.take_out(arguments, RAW)
        raw.update(taken)
        return with_special_tokens_of_run(with_latest_weights(left))

    app.launch("generate", lambda cfg: generate(cfg, raw), lambda cfg: find_problems(cfg, raw), rewrite)


if __name__ == "__main__":
    main()
