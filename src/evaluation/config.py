"""What to evaluate."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import ConfigDict, Field, model_validator

from src.config import Config, refuse
from src.data.config import DataConfig
from src.generation.config import Device

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class EvaluationConfig(Config):
    """Everything that ``python -m src.evaluate`` composes; ``conf/evaluate.yaml`` explains each key. Keys that a user
    adds (``+tags=[a]``) are allowed and kept."""

    model_config = ConfigDict(extra="allow")

    name: str = "evaluation"
    seed: int = Field(default=0, ge=0)
    weights: str = "gpt2"
    split: Literal["val", "train", "all"] = "val"
    max_tokens: int | None = Field(default=None, ge=-1, examples=[-1])
    context_length: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    surprises: int = Field(default=20, ge=0)
    tasks: tuple[str, ...] = Field(default=(), examples=[["lambada_openai", "hellaswag"]])
    tasks_path: str | None = None
    tasks_limit: int | None = Field(default=None, ge=1)
    device: Device = "auto"
    precision: Precision | None = None
    data: DataConfig = DataConfig(context_length=None)

    @model_validator(mode="after")
    def _windows_cover_what_is_scored(self) -> "EvaluationConfig":
        found = [
            f"data.{key}={value} is for training; use {key}={value}"
            for key, value in (("stride", self.data.stride), ("context_length", self.data.context_length))
            if value is not None
        ]
        if self.max_tokens == 0:
            found.append("max_tokens=0 must be at least 1, or -1 for every token; use max_tokens=-1")
        if self.stride and self.max_tokens not in (None, -1):
            found.append(
                f"stride={self.stride} scores every token, not max_tokens={self.max_tokens}; use max_tokens=-1"
            )
        if self.stride and self.context_length and self.stride > self.context_length:
            found.append(
                f"stride={self.stride} would leave out tokens between windows of context_length={self.context_length}; "
                f"use stride={self.context_length}"
            )
        refuse(found)
        return self


def problems_of_tasks(
    names: Sequence[str], folder: str | None, key: str = "tasks", folder_key: str = "tasks_path"
) -> list[str]:
    """Why no task can be loaded: lm-eval or the ``folder`` of task files is missing. The keys are the overrides that
    named the tasks and the folder."""
    found = []
    if names and importlib.util.find_spec("lm_eval") is None:
        found.append(f'{key}=[{",".join(names)}] needs lm-eval; pip install -e ".[tasks]"')
    if folder is not None and not os.path.isdir(os.path.expanduser(folder)):
        cure = f"use {folder_key}=<a folder of task files>"
        found.append(f"{folder_key}={folder} is not a folder (seen from {Path.cwd()}); {cure}")
    return found
