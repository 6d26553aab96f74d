"""Runs a command: checks its arguments, composes its config with Hydra, and turns errors into one line each."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.checkpoint.interruption import Interrupted, Interruption
from src.cli.help import help_text
from src.cli.overrides import CONF, Check, compose, composition_error, find_problems
from src.cli.streams import lasting_output

log = logging.getLogger(__name__)


class ConsoleHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the moment, so that lines appear above a live progress bar."""

    def __init__(self, stream: TextIO | None = None) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def launch(
    config_name: str,
    task: Callable[[DictConfig], Any],
    check: Check,
    rewrite: Callable[[list[str]], list[str]] = list,
    agree: Callable[[Callable[[], list[str]]], list[str]] = lambda make: make(),
) -> None:
    """Run ``task`` on the config that the command line asks for, as a Hydra application.

    ``rewrite`` may replace the arguments first; ``agree`` distributes them where several processes run the command.
    ``check`` raises a ValueError with the problems of a config, one per line. These and the problems of the overrides
    themselves are printed before any folder is made, and the process exits with 1. A ValueError, an OSError or
    Lightning's MisconfigurationException raised by ``task`` is a user's mistake too: its message is printed, and its
    traceback goes to the run's log.
    """
    logging.raiseExceptions = False  # on a full disk, a run ends when it cannot save, not when it cannot log
    with lasting_output(), Interruption():
        try:
            arguments = agree(lambda: _checked_arguments(config_name, check, rewrite))
        except Exception as error:
            told = getattr(error, "told", False)  # by another process of this run
            if not told and not isinstance(error, ValueError | OSError):
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
        except (HydraException, OmegaConfBaseException) as error:  # of --cfg, which nothing has checked
            fail([composition_error(error, config_name)])
        except OSError as error:  # before the task begins, Hydra writes the config into the run folder
            where = f"{error.filename or ''} {error.strerror}".strip()
            fail([f"{where}; use hydra.run.dir=<a folder that can be written to>"])
        if failed:
            sys.exit(1)


def _print_help(config_name: str, overrides: list[str]) -> None:
    try:
        cfg = compose(config_name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        fail([composition_error(error, config_name)])
    choices = dict(reversed(cfg.hydra.runtime.choices.items()))  # in the order of the defaults list
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    own = {group: choice for group, choice in choices.items() if not group.startswith("hydra/")}
    print(help_text(config_name, cfg, own, CONF))


def take_out(arguments: list[str], keys: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """``arguments`` without those that set any of ``keys``, and the values of these exactly as typed: Hydra's grammar
    does not accept every text."""
    left, taken = [], {key: [] for key in keys}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") in keys:
            taken[key.lstrip("+")].append(value)
        else:
            left.append(argument)
    return left, taken


def check_output(output: Path) -> None:
    """Raise a ValueError where the folder ``output`` can neither be made nor written to."""
    above = next(folder for folder in (output.absolute(), *output.absolute().parents) if os.path.lexists(folder))
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"output={output} cannot be made in {above}; use output=<a folder elsewhere>")


def _hydra_main(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    GlobalHydra.instance().clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors as they are; launch prints them
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()


def _run(task: Callable[[DictConfig], Any], cfg: DictConfig, failed: list[str]) -> Any:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return task(cfg)
    except Exception as error:
        raised = error.__cause__ if isinstance(error, InstantiationException) else None
        if raised is not None and _is_user_error(raised):  # what a constructor thought of its arguments
            error = raised
        told = getattr(error, "told", False)  # by another process of this run
        if told or _is_user_error(error) or isinstance(error, InstantiationException):
            lines = str(error).replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception", "").splitlines()
            for line in [] if told else filter(None, lines):
                log.error("error: %s", line)
            _log_to_file_only(traceback.format_exc())
        else:
            log.exception("stopped by an error")
        failed.append(str(error))
    if not sweeping:
        sys.exit(1)
    return float("inf")  # the objective of a failed job; the others run on


def _is_user_error(error: BaseException) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"ValueError", "OSError", "MisconfigurationException"})  # the last is Lightning's


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


def _checked_arguments(config_name: str, check: Check, rewrite: Callable[[list[str]], list[str]]) -> list[str]:
    for name, cure in (os.getcwd(), "cd <another folder>"), *((argument, "rename it") for argument in sys.argv[1:]):
        if name != name.encode(errors="replace").decode():
            fail([f"{name!a} is not UTF-8; {cure}"])
    try:
        arguments = rewrite(sys.argv[1:])
    except (ValueError, OSError) as error:
        fail(str(error).splitlines())
    if problems := find_problems(config_name, arguments, check):
        fail(problems)
    return arguments
