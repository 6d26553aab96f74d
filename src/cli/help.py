"""``--help``: what a command does, the choices of its groups, and its config with the comments of ``conf``."""

import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

KEY = re.compile(r"( *)([\w.]+):(?: .*?)?(?:  # (.*))?$")
FOOTER = "-m sweeps over several values, --cfg job prints only the config, --hydra-help lists what else Hydra can do."


def help_text(command: str, cfg: DictConfig, choices: dict[str, str | None], conf: Path) -> str:
    """The help of ``command`` with the config ``cfg``; ``choices`` maps each of its groups to the current choice."""
    about = (conf / f"{command}.yaml").read_text(encoding="utf-8").split("\ndefaults:")[0]
    lines = [line.removeprefix("# ") for line in about.splitlines()]
    files = _chain(conf / f"{command}.yaml")
    if choices:
        lines += ["", "Groups, group=choice (* marks the current choice):"]
    for group, choice in choices.items():
        found = sorted((conf / group).glob("*.yaml"))
        lines.append(f"  {group:<11} " + "  ".join(file.stem + "*" * (file.stem == choice) for file in found))
        files += _chain(conf / group / f"{choice}.yaml")
    comments = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        section = "" if file.parent == conf or "# @package _global_" in text else f"{file.parent.name}."
        comments |= {section + key: f"  # {comment}" for _, key, comment in _walk(text) if comment}
    lines += ["", "Keys, section.key=value:"]
    lines += [f"  {line}{comments.get(key, '')}" for line, key, _ in _walk(OmegaConf.to_yaml(cfg))]
    return "\n".join([*lines, "", FOOTER])


def _chain(file: Path) -> list[Path]:
    """The files of the same group that the defaults list of ``file`` names, then ``file``, which may override them."""
    if not file.is_file():
        return []
    defaults = OmegaConf.select(OmegaConf.load(file), "defaults", default=[])
    taken = [name for name in defaults if isinstance(name, str) and name != "_self_"]
    return [*(above for name in taken for above in _chain(file.with_name(f"{name}.yaml"))), file]


def _walk(text: str) -> Iterator[tuple[str, str, str]]:
    """Each line of a YAML file, the full key that it sets ("" for none), and its comment."""
    sections: list[tuple[int, str]] = []
    for line in text.splitlines():
        key = ""
        if found := KEY.match(line):
            depth = len(found[1])
            sections = [section for section in sections if section[0] < depth] + [(depth, found[2])]
            key = ".".join(name for _, name in sections)
        yield line, key, found[3] or "" if found else ""
