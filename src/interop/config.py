"""What to export."""

from typing import Literal

from pydantic import ConfigDict, Field

from src.config import Config


class ExportConfig(Config):
    """The keys of ``conf/export.yaml``, which explains them; keys that a user adds are allowed."""

    model_config = ConfigDict(extra="allow")

    weights: str = "gpt2"
    format: Literal["huggingface", "book", "weights"] = "huggingface"
    output: str = Field(examples=["my_model"])
