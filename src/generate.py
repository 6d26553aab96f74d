"""Continue texts: ``python -m src.generate weights=<x> prompt=<text> [overrides]``. See ``conf/generate.yaml``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.cli import app
from src.cli.latest import data_of_run, with_latest_weights
from src.cli.quoting import as_meant
from src.cli.typed import typed
from src.config import problems_of, refuse
from src.generation.config import GenerateConfig
from src.generation.prompts import read_prompt, read_stdin
from src.interop.locate import locate

if TYPE_CHECKING:
    import tiktoken

    from src.model.gpt import GPT

RAW = ("prompt", "prompt_file", "stop")  # taken literally: Hydra's grammar rejects some texts
RawTexts = dict[str, list[str]]


def check(cfg: DictConfig, raw: RawTexts | None = None) -> GenerateConfig:
    """``cfg``, and the ``raw`` values of ``RAW``, as a frozen config.

    Raises:
        ValueError: every problem that can be found without reading the weights, one per line.
    """
    config = typed(cfg, GenerateConfig)
    config = config.changed(**{key: values for key, values in (raw or {}).items() if values})
    found = problems_of(locate, config.weights)
    for file in config.prompt_file or ():
        found += problems_of(read_prompt, file)
    texts = len(config.prompt or ()) + len(config.prompt_file or ())
    if config.inspect and texts != 1:
        found.append(f"inspect=true shows a single text and {texts} are given; use one prompt=<text>")
    if not texts and not (sys.stdin and sys.stdin.isatty()):
        found.append("prompt is needed without a terminal to ask for it; use prompt=<text>, or prompt=- to read stdin")
    refuse(found)
    return config


def generate(cfg: DictConfig, raw: RawTexts) -> None:
    """Write the continuations of all prompts to stdout, or ask for prompts on a terminal.

    Raises:
        ValueError: the problems of the config; weights that cannot be read, or whose logits are not finite; a prompt
            that is not UTF-8; too little memory.
    """
    config = check(cfg, raw)
    import torch

    from src.device import is_out_of_memory, pick_accelerator
    from src.generation.text import ROWS, check_vocabulary
    from src.interop.weights import build, read_model
    from src.kernels.install import pack_for_decoding
    from src.tokenizer.encoding import unknown_characters

    prompts = [read_stdin() if text == "-" else text for text in config.prompt or ()]
    prompts += [read_prompt(file) for file in config.prompt_file or ()]
    dtype = torch.bfloat16 if config.precision == "bf16-true" else torch.float32
    model = read_model(config.weights)
    net = build(model.config, model.weights).to(pick_accelerator(config.device, "device"), dtype).eval()
    pack_for_decoding(net)
    check_vocabulary(net, model.tokenizer)
    if missing := unknown_characters("".join(prompts), model.tokenizer, config.special_tokens):
        print(f"not in the tokenizer {model.tokenizer.name}, read as U+FFFD: {missing[:20]!r}", file=sys.stderr)
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]  # a text file
    try:
        if prompts:
            _continue(net, model.tokenizer, prompts, config)
        else:
            _converse(net, model.tokenizer, config)
    except BrokenPipeError:  # nobody reads the texts any more
        pass
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(prompts) > 1:
            less = "one prompt at a time"
        elif config.num_beams > 1:
            less = f"num_beams={config.num_beams // 2}"
        elif config.num_samples > 1:
            less = f"num_samples={min(config.num_samples, ROWS) // 2}"
        else:
            less = "weights=<a smaller model>"
        raise ValueError(f"out of memory; use {less}") from error


def _continue(
    net: GPT, tokenizer: tiktoken.Encoding, prompts: list[str], config: GenerateConfig, first: int = 0
) -> None:
    """Write what follows each of ``prompts``: a single text while it is generated, several ones in their order."""
    from src.generation.inspection import Inspection
    from src.generation.text import continue_texts

    single = len(prompts) == config.num_samples == config.num_beams == 1
    streamed, begun = single and not config.inspect, False

    def stream(text: str) -> None:
        nonlocal begun
        _write(text if begun or not config.echo else prompts[0] + text)  # nothing is echoed if no token can be chosen
        begun = True

    try:
        found = continue_texts(
            net,
            prompts,
            config,
            config.stop or (),
            tokenizer=tokenizer,
            special_tokens=config.special_tokens,
            on_text=stream if streamed else None,
            on_step=Inspection(tokenizer) if config.inspect else None,
            first=first,
        )
    finally:
        if begun:
            _write("\n")
    if streamed:
        return
    for number, (prompt, samples) in enumerate(zip(prompts, found, strict=True), 1):
        for sample, continuation in enumerate(samples, 1):
            if not single:
                score = "" if continuation.score is None else f", score {continuation.score:.4f}"
                print(f"-- prompt {number}, text {sample}{score}", file=sys.stderr, flush=True)
            _write((prompt if config.echo else "") + continuation.text + "\n")


def _converse(net: GPT, tokenizer: tiktoken.Encoding, config: GenerateConfig) -> None:
    """A prompt per line until the end of the input; each draws as the prompt of its number on a command line would."""
    print("a text to continue, or Ctrl-D", file=sys.stderr)
    for turn in range(sys.maxsize):
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        _continue(net, tokenizer, [line.removesuffix("\n")], config, first=turn)


def _write(text: str) -> None:
    print(text, end="", flush=True)
    if getattr(sys.stdout, "lost", False):
        raise BrokenPipeError


def with_special_tokens_of_run(overrides: list[str]) -> list[str]:
    """``overrides``, and the ``special_tokens`` of the run that wrote the ``weights``, unless they are given."""
    _, values = app.take_out(overrides, ("weights", "special_tokens"))
    if values["special_tokens"] or not values["weights"]:
        return overrides
    of_run = data_of_run(as_meant(values["weights"][-1])).get("special_tokens")
    return [*overrides, "special_tokens=text"] if of_run == "text" else overrides


def main() -> None:
    raw: RawTexts = {}

    def rewrite(arguments: list[str]) -> list[str]:
        left, taken = app.take_out(arguments, RAW)
        raw.update(taken)
        return with_special_tokens_of_run(with_latest_weights(left))

    app.launch("generate", lambda cfg: generate(cfg, raw), lambda cfg: check(cfg, raw), rewrite)


if __name__ == "__main__":
    main()
