"""The model classes that a config can name."""

import torch

from src.model.config import GPTConfig
from src.model.gpt import GPT

# A checkpoint names its class by a key of this table and never by an import path, which would run a stranger's code.
ARCHITECTURES: dict[str, type[GPT]] = {"gpt2": GPT}


def build_model(config: GPTConfig) -> GPT:
    """A new model of the class that ``config.architecture`` names, on the default device.

    Raises:
        ValueError: ``config.architecture`` is not in ``ARCHITECTURES``.
    """
    name = config.architecture
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model.architecture={name} is not one of {known}; use model.architecture=gpt2")
    return ARCHITECTURES[name](config)


def count_parameters(config: GPTConfig) -> int:
    """The number of parameters of a model, without allocating it; tied ones count once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())
