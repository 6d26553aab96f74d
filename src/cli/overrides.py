"""What is wrong with the overrides on a command line, before anything is composed or run."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from src.config import nearest, problems_of
from src.training.config import TrainerConfig

CONF = Path(__file__).parents[2] / "conf"
# groups whose choices differ in their keys
CHOICES_WITH_KEYS = ("optimizer", "schedule", "data", "tokenizer", "callbacks", "logger")

Check = Callable[[DictConfig], Any]


def compose(config_name: str, overrides: list[str], return_hydra_config: bool = False) -> DictConfig:
    """The config of a command, as its command line with ``overrides`` would compose it."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, overrides, return_hydra_config)


def find_problems(config_name: str, argv: list[str], check: Check) -> list[str]:
    """Every problem of the arguments ``argv`` of a command, one line each: overrides that cannot be parsed, unknown
    keys and choices, run folders in use, and what ``check`` raises as ValueError for the composed config."""
    sweeping = bool({"-m", "--multirun"} & set(argv))
    overrides = [argument for argument in argv if argument not in ("-m", "--multirun")]
    if any(argument.startswith("-") for argument in overrides):
        return []  # --cfg, --info and so on are Hydra's own
    parsed, found = _parse(config_name, overrides, sweeping)
    resuming = any(override.key_or_group in ("resume", "sweep.resume") and override.value() for override in parsed)
    for override in parsed:
        found += _wrong_choice(override)
        if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir") and not resuming:
            found += _folder_in_use(override, config_name)
    if found:
        return found
    try:  # the jobs of a sweep check their own configs; one of them stands for all
        cfg = compose(config_name, _first_choices(parsed), return_hydra_config=True)
        folder = os.path.abspath(cfg.hydra.sweep.dir if sweeping else cfg.hydra.run.dir)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _unknown_keys(config_name, parsed) or [composition_error(error, config_name)]
    if "${" in folder:  # Hydra copies it into its config as it is
        cure = "cd <another folder>" if "${" in os.getcwd() else "another name"
        return [f"the folder {folder} has ${{ in its name, which reads as an interpolation; use {cure}"]
    with open_dict(cfg):
        del cfg["hydra"]
    if missing := OmegaConf.missing_keys(cfg):
        return [f"{key} is needed; use {key}=<value>" for key in sorted(missing)]
    if sweeping:
        return []
    return problems_of(check, cfg)


def composition_error(error: Exception, config_name: str) -> str:
    return f"{' '.join(str(error).splitlines()[0].split())} See python -m src.{config_name} --help"


def keys_of(cfg: Any, prefix: str = "") -> set[str]:
    """All keys of ``cfg``, sections included, by their full names."""
    found = set()
    for name in cfg:
        key = f"{prefix}{name}"
        found.add(key)
        if not (OmegaConf.is_interpolation(cfg, name) or OmegaConf.is_missing(cfg, name)):
            value = cfg[name]
            found |= keys_of(value, f"{key}.") if isinstance(value, DictConfig) else set()
    return found


def _parse(config_name: str, overrides: list[str], sweeping: bool) -> tuple[list[Override], list[str]]:
    parsed, found = [], []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            key, _, value = text.partition("=")
            quoted = f"\"{key}='{value}'\"" if value and not set(value) & set("'\"") else "key=value"
            found.append(f"{text} is not an override; use {quoted}, with quotes around all but plain words and numbers")
            continue
        if not override.key_or_group:
            found.append(f"{text} is not an override, it names no key; use key=value")
            continue
        parsed.append(override)
        if override.is_sweep_override() and not sweeping:
            found.append(f"{text} names several values; use python -m src.{config_name} -m {text} for a sweep")
    return parsed, found


def _first_choices(overrides: Iterable[Override]) -> list[str]:
    """``overrides`` with the first value of each sweep: null, or a group's default, where only a sweeper knows it."""
    found = []
    for override in overrides:
        if not override.is_sweep_override():
            found.append(override.input_line)
        elif (choices := _choices(override)) or not _is_group(override):
            found.append(f"{override.get_key_element()}={choices[0] if choices else 'null'}")
    return found


def _choices(override: Override) -> list[Any]:
    """The values of an override; none for a glob or an interval, which only a sweeper can expand."""
    if not override.is_sweep_override():
        return [override.value()]
    try:
        return list(override.sweep_string_iterator())
    except HydraException:
        return []


def _is_group(override: Override) -> bool:
    return (CONF / override.key_or_group).is_dir() and not override.key_or_group.startswith("hydra")


def _wrong_choice(override: Override) -> list[str]:
    key = override.key_or_group
    if not _is_group(override) or override.is_delete():
        return []
    choices = sorted(file.stem for file in (CONF / key).glob("*.yaml"))
    return [
        f"{key}={value} does not exist; use {key}={nearest(str(value), choices)} (there are: {', '.join(choices)})"
        for value in _choices(override)
        if str(value) not in choices
    ]


def _unknown_keys(config_name: str, overrides: list[Override]) -> list[str]:
    """A line for each of ``overrides`` whose key does not exist, with the nearest key that does."""
    try:
        base = compose(config_name, _first_choices(filter(_is_group, overrides)))
    except (HydraException, OmegaConfBaseException):
        base = compose(config_name, [])
    known = keys_of(base)
    for group in set(CHOICES_WITH_KEYS) & set(base):
        for file in (CONF / group).glob("*.yaml"):
            known |= {f"{group}.{name}" for name in keys_of(OmegaConf.load(file)) if "defaults" not in name}
    return [
        _unknown(override, config_name, known)
        for override in overrides
        if not (override.key_or_group in known or override.is_add() or override.is_force_add() or override.is_delete())
        and not _is_group(override)
        and re.split("[./]", override.key_or_group)[0] != "hydra"
    ]


def _unknown(override: Override, config_name: str, known: set[str]) -> str:
    key = override.key_or_group
    if key.startswith("trainer.") and key.removeprefix("trainer.") in _trainer_arguments():
        return f"{key} is an argument of Lightning's Trainer that conf/trainer does not set; use +{override.input_line}"
    return f"{key} is not a key of {config_name}: did you mean {nearest(key, sorted(known))}? (all: --cfg job)"


def unknown_trainer_arguments(trainer: dict[str, Any]) -> list[str]:
    """A line for each key of the ``trainer`` section that Lightning's Trainer does not have."""
    new = set(trainer) - set(TrainerConfig.model_fields) - set(OmegaConf.load(CONF / "trainer" / "default.yaml"))
    unknown = new - _trainer_arguments() if new else set()
    return [f"trainer.{key} is not an argument of Lightning's Trainer; leave it out" for key in sorted(unknown)]


def _trainer_arguments() -> set[str]:
    import inspect

    from lightning.pytorch import Trainer

    return set(inspect.signature(Trainer).parameters)


def _folder_in_use(override: Override, config_name: str) -> list[str]:
    """Whether the folder that ``override`` names holds anything, which Hydra would overwrite."""
    folder = Path(str(override.value()))
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    key = override.key_or_group
    resume = f"resume={folder} to continue a run, or " if config_name == "train" else ""
    return [f"{key}={folder} is not empty; use {resume}{key}=<a new folder>"]
