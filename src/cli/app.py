"""The front door of every command: Hydra composes, problems are told in one line each, then the work starts."""

import dataclasses
import difflib
import json
import logging
import os
import re
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
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from src.cli.help import help_text
from src.checkpoint.interruption import Interrupted, Interruption

CONF = Path(__file__).parents[2] / "conf"

log = logging.getLogger(__name__)


class ConsoleHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the moment, so that lines appear above a live progress bar."""

    def __init__(self, stream: TextIO | None = None) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def launch(
    config_name: str,
    task: Callable[[DictConfig], Any],
    check: Callable[[DictConfig], list[str]],
    rewrite: Callable[[list[str]], list[str]] = list,
    agree: Callable[[Callable[[], list[str]]], list[str]] = lambda make: make(),
) -> None:
    """Run ``task`` on the config that the command line asks for, as a Hydra application.

    ``rewrite`` may replace the arguments first; ``agree`` asks for them, where one process does so for several.

    ``check`` lists a config's problems. They, and whatever is wrong with the overrides themselves, are printed one
    per line, before any folder is made, and the process exits with 1. A ``ValueError``, an ``OSError`` or Lightning's
    ``MisconfigurationException`` out of ``task`` is a user's mistake too: its message is printed, its traceback kept in
    the run's log.
    """
    logging.raiseExceptions = False  # a full disk stops a run by what it cannot save, not by what it cannot log
    with Interruption():
        try:
            arguments = agree(lambda: _checked_arguments(config_name, check, rewrite))
        except Exception as error:
            told = getattr(error, "told", False)  # by another process of this run
            if not told and not isinstance(error, ValueError):
                raise
            fail([] if told else str(error).splitlines())
        if {"-h", "--help"} & set(arguments):
            _print_help(config_name, [argument for argument in arguments if not argument.startswith("-")])
            return
        sys.argv[1:] = arguments
        failed: list[str] = []
        try:
            _hydra_main(config_name, lambda cfg: _run(task, cfg, failed))
        except Interrupted as interrupted:
            if not interrupted.told:
                print(f"stopped by {interrupted.signal.name}", file=sys.stderr)
            raise
        except OSError as error:  # before the task begins, Hydra writes the config into the run folder
            fail([f"{error.filename or ''} {error.strerror}: hydra.run.dir=<a folder that can be written to>".strip()])
        if failed:
            sys.exit(1)


def _print_help(config_name: str, overrides: list[str]) -> None:
    try:
        cfg = compose(config_name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        fail([_not_composed(error, config_name)])
    choices = dict(reversed(cfg.hydra.runtime.choices.items()))  # in the order of the defaults list
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    own = {group: choice for group, choice in choices.items() if not group.startswith("hydra/")}
    print(help_text(config_name, cfg, own, CONF))


def take_out(arguments: list[str], keys: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """``arguments`` without those that set any of ``keys``, and the values of these to the letter: Hydra's grammar
    knows only some texts."""
    left, taken = [], {key: [] for key in keys}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") in keys:
            taken[key.lstrip("+")].append(value)
        else:
            left.append(argument)
    return left, taken


def compose(config_name: str, overrides: list[str], return_hydra_config: bool = False) -> DictConfig:
    """The config of a command, as its command line with ``overrides`` would compose it."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, overrides, return_hydra_config)


def check_sections(cfg: DictConfig, sections: dict[str, type]) -> tuple[dict[str, Any], list[str]]:
    """The ``sections`` of ``cfg`` as instances of their dataclasses, and all problems: types, unknown keys, values.

    A value that means the same in another type (``no`` for a switch) is replaced in ``cfg`` by what it means. The
    section called "" is the config's own top level. Keys that a dataclass lacks are left alone at the top level and in
    ``trainer``, where Lightning judges them.
    """
    found: list[str] = []
    checked = {}
    for section, schema in sections.items():
        node, prefix = (cfg[section], f"{section}.") if section else (cfg, "")
        fields = {field.name: field for field in dataclasses.fields(schema)}
        typed = OmegaConf.structured(schema)
        OmegaConf.set_readonly(typed, False)
        before = len(found)
        for key in node:
            if key in fields:
                try:
                    typed[key] = node[key]
                    said_as_text = isinstance(node[key], str) != isinstance(typed[key], str)  # not 2 for 2.0
                    if said_as_text and not OmegaConf.is_interpolation(node, key):
                        node[key] = typed[key]
                except OmegaConfBaseException:
                    if not OmegaConf.is_interpolation(node, key):  # else it is told where the value comes from
                        found.append(_wrong_type(prefix, fields[key], node[key]))
                    before = -1
            elif section not in ("", "trainer") and not key.startswith("_"):
                found.append(f"{prefix}{key} does not exist: did you mean {prefix}{_nearest(key, list(fields))}?")
        if len(found) == before:
            try:
                checked[section] = schema(**typed)
            except ValueError as error:
                found += str(error).splitlines()
    return checked, found


def problems_of_output(output: Path) -> list[str]:
    """Why the folder ``output`` cannot be made, or written to where it is there already; in a line, if at all."""
    above = next(folder for folder in (output.absolute(), *output.absolute().parents) if os.path.lexists(folder))
    if above.is_dir() and os.access(above, os.W_OK):
        return []
    return [f"output={output} cannot be made in {above}: output=<a folder elsewhere>"]


def _wrong_type(prefix: str, field: dataclasses.Field, value: Any) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    cure = default if isinstance(default, str) else json.dumps(default)
    kind = str(getattr(field.type, "__name__", field.type)).replace("None", "null")
    override = f"{prefix}{field.name}={cure}".replace(" ", "")
    override = f"'{override}'" if isinstance(default, list) else override
    return f"{prefix}{field.name}={value} is not of type {kind}: {override}"


def _hydra_main(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    GlobalHydra.instance().clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors as they are, for launch to tell them
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()


def _run(task: Callable[[DictConfig], Any], cfg: DictConfig, failed: list[str]) -> Any:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return task(cfg)
    except Exception as error:
        if type(error).__name__ == "InstantiationException":  # Hydra's, around what a class thought of its arguments
            error = error.__cause__ or error
        told = getattr(error, "told", False)  # by another process of this run
        user_mistakes = ("ValueError", "OSError", "MisconfigurationException", "InstantiationException")
        if told or {base.__name__ for base in type(error).__mro__} & set(user_mistakes):
            for line in [] if told else str(error).splitlines():
                log.error("error: %s", line)
            _log_to_file_only(traceback.format_exc())
        else:
            log.exception("stopped by an error")
        failed.append(str(error))
    if not sweeping:
        sys.exit(1)
    return float("inf")  # the objective of a failed job: the others run on


def _log_to_file_only(text: str) -> None:
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def close_log_files(folder: Path) -> None:
    """Log nothing more into ``folder``."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == folder:
            root.removeHandler(handler)
            handler.close()


def fail(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1)


def _checked_arguments(
    config_name: str, check: Callable[[DictConfig], list[str]], rewrite: Callable[[list[str]], list[str]]
) -> list[str]:
    for name, cure in (os.getcwd(), "cd <another folder>"), *((argument, "rename it") for argument in sys.argv[1:]):
        if name != name.encode(errors="replace").decode():
            fail([f"{name!a} is not UTF-8: {cure}"])
    try:
        arguments = rewrite(sys.argv[1:])
    except ValueError as error:
        fail(str(error).splitlines())
    if problems := _find_problems(config_name, arguments, check):
        fail(problems)
    return arguments


def _find_problems(config_name: str, argv: list[str], check: Callable[[DictConfig], list[str]]) -> list[str]:
    sweeping = bool({"-m", "--multirun"} & set(argv))
    overrides = [argument for argument in argv if argument not in ("-m", "--multirun")]
    if any(argument.startswith("-") for argument in overrides):
        return []  # --cfg, --info and their like are Hydra's own
    found, parsed = [], []
    for override in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(override))
        except HydraException:
            key, _, value = override.partition("=")
            quoted = f"\"{key}='{value}'\"" if value and not set(value) & set("'\"") else "key=value"
            found.append(f"{override} is no override: {quoted}, with quotes around all but plain words and numbers")
        else:
            if not parsed[-1].key_or_group:
                found.append(f"{override} is no override, it names no key: key=value")
                parsed.pop()
            elif parsed[-1].is_sweep_override() and not sweeping:
                found.append(f"{override} names several values: python -m src.{config_name} -m {override} to sweep")
    resuming = any(override.key_or_group == "resume" and override.value() for override in parsed)
    for override in parsed:
        found += _wrong_choice(override)
        if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir") and not resuming:
            found += _taken(override, config_name)
    if found:
        return found
    try:  # of a sweep, whose jobs check their own configs, one stands for all
        cfg = compose(config_name, _first_choices(parsed), return_hydra_config=True)
        folder = os.path.abspath(cfg.hydra.sweep.dir if sweeping else cfg.hydra.run.dir)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _unknown_keys(config_name, parsed) or [_not_composed(error, config_name)]
    if "${" in folder:  # which Hydra puts into its config as it is
        cure = "cd <another folder>" if "${" in os.getcwd() else "another name"
        return [f"the folder {folder} has ${{ in its name, which reads as an interpolation: {cure}"]
    with open_dict(cfg):
        del cfg["hydra"]
    if missing := OmegaConf.missing_keys(cfg):
        return [f"{key} is needed: {key}=<value>" for key in sorted(missing)]
    return [] if sweeping else check(cfg)


def _not_composed(error: Exception, config_name: str) -> str:
    return f"{' '.join(str(error).splitlines()[0].split())} See python -m src.{config_name} --help"


def _first_choices(overrides: Iterable[Override]) -> list[str]:
    """``overrides`` without the sweeping; what only a sweeper can spell out is null, or the default of its group."""
    found = []
    for override in overrides:
        if not override.is_sweep_override():
            found.append(override.input_line)
        elif (choices := _choices(override)) or not _is_group(override):
            found.append(f"{override.get_key_element()}={choices[0] if choices else 'null'}")
    return found


def _choices(override: Override) -> list[Any]:
    """What an override stands for; nothing for a glob or an interval, which only a sweeper can spell out."""
    if not override.is_sweep_override():
        return [override.value()]
    try:
        return list(override.sweep_string_iterator())
    except HydraException:
        return []


def _is_group(override: Override) -> bool:
    return (CONF / override.key_or_group).is_dir() and not override.key_or_group.startswith("hydra")


def _wrong_choice(override: Override) -> list[str]:
    """Whether ``override`` names a choice that its config group does not have; with the nearest that it has."""
    if not _is_group(override):
        return []
    key = override.key_or_group
    choices = sorted(file.stem for file in (CONF / key).glob("*.yaml"))
    return [
        f"{key}={value} does not exist: {key}={_nearest(str(value), choices)} (there are: {', '.join(choices)})"
        for value in _choices(override)
        if str(value) not in choices
    ]


def _unknown_keys(config_name: str, overrides: list[Override]) -> list[str]:
    """Which of ``overrides``, that do not compose, set a key that does not exist, a line each with the nearest that
    does. What begins with + is said to be new."""
    try:
        base = compose(config_name, _first_choices(filter(_is_group, overrides)))
    except (HydraException, OmegaConfBaseException):
        base = compose(config_name, [])
    known = _keys(base)
    for group in {"optimizer", "schedule", "data", "callbacks", "logger"} & set(base):  # choices whose keys differ
        for file in (CONF / group).glob("*.yaml"):
            known |= {f"{group}.{name}" for name in _keys(OmegaConf.load(file)) if "defaults" not in name}
    return [
        f"{key} is no key of {config_name}: did you mean {_nearest(key, sorted(known))}? (all: --cfg job)"
        for override in overrides
        for key in [override.key_or_group]
        if not (key in known or override.is_add() or override.is_force_add() or override.is_delete())
        and not _is_group(override)
        and re.split("[./]", key)[0] != "hydra"
    ]


def _taken(override: Override, config_name: str) -> list[str]:
    """Whether the folder that ``override`` names holds anything; Hydra would write over it."""
    folder = Path(str(override.value()))
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    key = override.key_or_group
    resume = f"resume={folder} to continue a run, or " if config_name == "train" else ""
    return [f"{key}={folder} is not empty: {resume}{key}=<a new folder>"]


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
        contained = 0.3 if last in parts[choice] or parts[choice] in last else 0.0
        same_section = 0.5 if "." in word and word.split(".")[0] == choice.split(".")[0] else 0.0
        return by_part + contained + same_section + 0.5 * difflib.SequenceMatcher(None, word, choice).ratio()

    return max(choices, key=likeness)
