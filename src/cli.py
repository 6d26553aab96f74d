"""The front door of every command: Hydra composes, problems are told in one line each, then the work starts."""

import dataclasses
import difflib
import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parents[1] / "conf"

log = logging.getLogger(__name__)


class ConsoleHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the moment, so that lines appear above a live progress bar."""

    def __init__(self, stream: TextIO | None = None) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def launch(config_name: str, task: Callable[[DictConfig], Any], check: Callable[[DictConfig], list[str]]) -> None:
    """Run ``task`` on the config that the command line asks for, as a Hydra application.

    ``check`` lists a config's problems. They, and whatever is wrong with the overrides themselves, are printed one
    per line, before any folder is made, and the process exits with 1. A ``ValueError``, an ``OSError`` or Lightning's
    ``MisconfigurationException`` out of ``task`` is a user's mistake too: its message is printed, its traceback kept in
    the run's log.
    """
    problems = _find_problems(config_name, sys.argv[1:], check)
    if problems:
        _fail(problems)
    _hydra_main(config_name, lambda cfg: _run(task, cfg))


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The config of a command, as its command line with ``overrides`` would compose it."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, overrides)


def section_problems(cfg: DictConfig, sections: dict[str, type]) -> list[str]:
    """Wrong types, unknown keys and impossible values of the ``sections`` of ``cfg``, each described by a dataclass.

    Keys of ``trainer`` that its dataclass lacks are left to Lightning.
    """
    found = []
    for section, schema in sections.items():
        defaults = {field.name: field for field in dataclasses.fields(schema)}
        typed = OmegaConf.structured(schema)
        OmegaConf.set_readonly(typed, False)
        values, sound = {}, True
        for key, value in OmegaConf.to_container(cfg[section], resolve=True).items():
            if key in defaults:
                try:
                    typed[key] = value
                    values[key] = typed[key]
                except OmegaConfBaseException:
                    default = defaults[key].default
                    cure = "null" if default is None else default
                    kind = str(defaults[key].type).replace("None", "null").removeprefix("<class '").removesuffix("'>")
                    found.append(f"{section}.{key}={value} is not of type {kind}: {section}.{key}={cure}")
                    sound = False
            elif section != "trainer" and not key.startswith("_"):
                found.append(f"{section}.{key} does not exist: did you mean {section}.{_nearest(key, list(defaults))}?")
        if sound:
            try:
                schema(**values)
            except ValueError as error:
                found += str(error).splitlines()
    return found


def _hydra_main(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    GlobalHydra.instance().clear()
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()


def _run(task: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return task(cfg)
    except Exception as error:
        user_mistakes = ("ValueError", "OSError", "MisconfigurationException")  # the last is Lightning's own
        if {base.__name__ for base in type(error).__mro__} & set(user_mistakes):
            for line in str(error).splitlines():
                log.error("error: %s", line)
            _log_to_file_only(traceback.format_exc())
        else:
            log.exception("stopped by an error")
    if not sweeping:
        sys.exit(1)
    return float("inf")  # the objective of a failed job: the others run on


def _log_to_file_only(text: str) -> None:
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _fail(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1)


def _find_problems(config_name: str, argv: list[str], check: Callable[[DictConfig], list[str]]) -> list[str]:
    sweeping = bool({"-m", "--multirun"} & set(argv))
    overrides = [argument for argument in argv if argument not in ("-m", "--multirun")]
    if any(argument.startswith("-") for argument in overrides):
        return []  # --help, --cfg and their like are Hydra's own
    found, parsed = [], []
    for override in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(override))
        except HydraException:
            found.append(f"{override} is no override: key=value, with quotes around a value of several words")
    base = compose(config_name, [])
    for override in parsed:
        found += _unknown(config_name, base, override)
    if found:
        return found
    if sweeping:  # each job checks its own config; here one of them stands for all
        overrides = [_first_choice(override) for override in parsed]
    try:
        cfg = compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return [" ".join(str(error).split("\n")[0].split())]
    if missing := OmegaConf.missing_keys(cfg):
        return [f"{key} is needed: {key}=<value>" for key in sorted(missing)]
    return [] if sweeping else check(cfg)


def _first_choice(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def _unknown(config_name: str, base: DictConfig, override: Override) -> list[str]:
    """Whether ``override`` names a config group's choice or a key that does not exist; with the nearest that does."""
    key = override.key_or_group
    if key.split(".")[0] == "hydra":
        return []
    folder = CONF / key
    if folder.is_dir():
        choices = sorted(file.stem for file in folder.glob("*.yaml"))
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        return [
            f"{key}={value} does not exist: {key}={_nearest(str(value), choices)} (there are: {', '.join(choices)})"
            for value in values
            if str(value) not in choices
        ]
    known = _keys(base)
    for group in ("schedule", "data", "callbacks", "logger"):  # choices whose keys differ
        for file in (CONF / group).glob("*.yaml"):
            known |= {f"{group}.{name}" for name in _keys(OmegaConf.load(file)) if "defaults" not in name}
    if key in known or override.is_delete():
        return []
    if override.is_add() and key.split(".")[0] in ("callbacks", "logger"):
        return []
    return [f"{key} is no key of {config_name}: did you mean {_nearest(key, sorted(known))}?"]


def _keys(cfg: DictConfig, prefix: str = "") -> set[str]:
    found = set()
    for name in cfg:
        key = f"{prefix}{name}"
        found.add(key)
        value = cfg._get_node(name)  # not resolved: an interpolation may need what only a run has
        if isinstance(value, DictConfig):
            found |= _keys(value, f"{key}.")
    return found


def _nearest(word: str, choices: list[str]) -> str:
    """The choice most like ``word``: by last part, by initials (lr: learning_rate), else by spelling."""
    last = word.split(".")[-1]
    parts = {choice: choice.split(".")[-1] for choice in choices}
    for choice, part in parts.items():
        if last in (part, "".join(name[:1] for name in part.split("_"))):
            return choice

    def likeness(choice: str) -> float:
        by_part = difflib.SequenceMatcher(None, last, parts[choice]).ratio()
        return by_part + difflib.SequenceMatcher(None, word, choice).ratio()

    return max(choices, key=likeness)
