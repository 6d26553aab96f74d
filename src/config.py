"""The base class of every section of a configuration: frozen, checked, and with errors that end in an override."""

import difflib
import json
from collections.abc import Callable, Iterable
from reprlib import repr as shortened
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class Config(BaseModel):
    """A frozen set of named values, given by name or in the order of the fields.

    Fields declare types, ranges and defaults. An ``after`` validator that finds several fields at odds raises a
    ValueError with a line per problem: ``<key>=<value> <problem>; use <override>``.

    ``section`` is what stands before a field's name in an override: ``model`` for ``model.n_heads``.

    Raises:
        ValueError: one line per problem, all problems at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
    section: ClassVar[str] = ""

    def __init__(self, *positional: Any, **values: Any) -> None:
        try:
            super().__init__(**dict(zip(type(self).model_fields, positional, strict=False)), **values)
        except ValidationError as error:
            lines = (line for problem in error.errors(include_url=False) for line in _lines_of(type(self), problem))
            raise ValueError("\n".join(dict.fromkeys(lines))) from None

    def changed(self, **values: Any) -> Self:
        """A copy with other ``values``, validated again."""
        return type(self)(**{**dict(self), **values})


def _lines_of(config: type[Config], problem: ErrorDetails) -> list[str]:
    """``problem`` in terms of overrides."""
    if problem["type"] == "value_error":  # of a validator of our own, which says it all
        return str(problem.get("ctx", {})["error"]).splitlines()
    names, section, field = [config.section] if config.section else [], config, None
    for part in problem["loc"]:
        if not (isinstance(part, str) and (part in section.model_fields or problem["type"] == "extra_forbidden")):
            break  # an element of a list, or a branch of a union: the field as a whole is to blame
        names.append(part)
        field = section.model_fields.get(part)
        inner = field and field.annotation
        if not (isinstance(inner, type) and issubclass(inner, Config)):
            break
        section = inner
    key = ".".join(names)
    if problem["type"] == "extra_forbidden":
        names[-1] = nearest(names[-1], section.model_fields)
        return [f"{key} does not exist: did you mean {'.'.join(names)}?"]
    if field is None:
        return [f"{key} {problem['msg'].lower()}"]
    default = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
    if problem["type"] == "missing":
        within = len(names) - bool(config.section) < len(problem["loc"])  # an element of a list
        if within:
            return [f"{key}={shown(problem['input'])} has too few values; use {override(key, default)}"]
        return [f"{key} is needed; use {override(key, field.examples[0] if field.examples else '<value>')}"]
    return [f"{key}={shown(problem['input'])} {_wrong(problem)}; use {override(key, default)}"]


def _wrong(problem: ErrorDetails) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in LIMITS:
        return f"must be {LIMITS[kind][0]} {context[LIMITS[kind][1]]:,}"
    if kind == "literal_error":
        return f"is not one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    return problem["msg"].removeprefix("Input ").split(", unable to")[0]


LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def problems_of(act: Callable[..., Any], *given: Any) -> list[str]:
    """The lines of the ValueError that ``act(*given)`` raises; none if it raises none."""
    try:
        act(*given)
    except ValueError as error:
        return str(error).splitlines()
    return []


def refuse(problems: Iterable[str]) -> None:
    """Raise a ValueError with ``problems``, one per line, if there are any."""
    if lines := list(problems):
        raise ValueError("\n".join(lines))


def override(key: str, value: Any) -> str:
    """``key=value`` as it is typed on a command line."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"'{key}={text}'" if isinstance(value, list | tuple) else f"{key}={text}"


def shown(value: Any) -> str:
    """``value``, which may come from anywhere, as one short printable line."""
    if isinstance(value, str):
        return value if value.isprintable() and len(value) < 80 else shortened(value)
    return "null" if value is None else shortened(value)


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice most like ``word``: by last part, by initials (lr: learning_rate), else by spelling."""
    last = word.split(".")[-1]
    parts = {choice: choice.split(".")[-1] for choice in choices}
    for choice, part in parts.items():
        if last in (part, "".join(name[:1] for name in part.split("_"))):
            return choice

    def likeness(choice: str) -> float:
        by_part = difflib.SequenceMatcher(None, last, parts[choice]).ratio()
        contained = 0.3 if last in parts[choice] or parts[choice] in last else 0.0
        same_section = 0.5 if "." in word and word.split(".")[0] == choice.split(".")[0] else 0.0
        return by_part + contained + same_section + 0.5 * difflib.SequenceMatcher(None, word, choice).ratio()

    return max(parts, key=likeness)
