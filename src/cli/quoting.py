"""Overrides as text: quoted for Hydra's grammar and for a shell, and read back."""

import re
import shlex
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def key_of(override: str) -> str:
    """The key that ``override`` sets, adds or deletes."""
    return override.split("=")[0].lstrip("+~").split("@")[0]


def quoted(path: str | Path) -> str:
    """``path`` as the value of an override, in quotes for Hydra's grammar and without interpolations."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(path))
    return QuotedString(text, Quote.single).with_quotes()


def as_typed(folder: Path) -> str:
    """``folder`` as the value of ``resume=``, which is taken literally unless it is in quotes."""
    return quoted(folder) if str(folder)[:1] in ("'", '"') else str(folder)


def as_meant(text: str) -> str:
    """The value that ``text``, as typed after the ``=`` of an override, stands for."""
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        with suppress(HydraException, OmegaConfBaseException):
            value = OverridesParser.create().parse_override(f"resume={text}").value()
            return str(OmegaConf.create({"resume": value}).resume)
    return text


def command_line(overrides: list[str]) -> str:
    """The command that trains with ``overrides``, quoted for a shell."""
    return shlex.join(["python", "-m", "src.train", *overrides])


def resume_override(folder: Path, key: str = "resume") -> str:
    """The override that resumes the run in ``folder``, quoted for a shell."""
    return shlex.quote(f"{key}={as_typed(folder)}")


def split_overrides(overrides: list[str], key: str) -> tuple[list[str], list[str], list[str]]:
    """Hydra's own flags, the overrides except those of ``key``, and the values that ``key`` was given."""
    flags = [override for override in overrides if "=" not in override and not override.startswith("~")]
    rest = [override for override in overrides if override not in flags and key_of(override) != key]
    return flags, rest, [as_meant(one.split("=", 1)[-1]) for one in overrides if key_of(one) == key]
