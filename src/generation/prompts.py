"""Prompts from files and pipes."""

import functools
import sys
from typing import BinaryIO

from src.files import expanded

LONGEST_PROMPT = 2**24  # bytes


@functools.cache  # a pipe can be read only once, and is read when the command line is checked
def read_prompt(file: str) -> str:
    """The text of ``file``.

    Raises:
        ValueError: it cannot be read, is not UTF-8, or is longer than ``LONGEST_PROMPT``.
    """
    try:
        with expanded(file).open("rb") as content:
            return _decoded(content, "prompt_file", file)
    except OSError as error:
        raise ValueError(
            f"prompt_file={file} cannot be read ({error.strerror}); use prompt_file=<a text file>"
        ) from None


@functools.cache
def read_stdin() -> str:
    """The text on standard input; see :func:`read_prompt`."""
    return _decoded(sys.stdin.buffer, "prompt", "-") if sys.stdin else ""


def _decoded(file: BinaryIO, key: str, value: str) -> str:
    content = file.read(LONGEST_PROMPT + 1)  # a device such as /dev/zero has no end
    if len(content) > LONGEST_PROMPT:
        raise ValueError(
            f"{key}={value} has more than {LONGEST_PROMPT / 1e6:.0f} MB; use {key}=<the end of it, which counts>"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{key}={value} is not UTF-8 at byte {error.start}; use iconv -t UTF-8 to convert it"
        ) from None
