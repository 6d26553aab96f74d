"""From what Hydra composed to a frozen configuration."""

from collections.abc import Mapping
from typing import Any, TypeVar

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config import Config

C = TypeVar("C", bound=Config)


def built(nodes: Mapping[str, Any], **arguments: Any) -> list[Any]:
    """The objects that ``nodes`` with a ``_target_`` describe, each with further ``arguments``; null builds nothing."""
    return [instantiate(node, **arguments) for node in nodes.values() if node is not None]


def typed(cfg: DictConfig, kind: type[C]) -> C:
    """``cfg`` as an instance of ``kind``.

    Raises:
        ValueError: one line per problem: missing values, interpolations, types, ranges, sections that do not agree.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    assert isinstance(values, dict)
    values.pop("hydra", None)
    return kind(**{str(key): value for key, value in values.items()})
