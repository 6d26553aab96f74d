"""Lightning's names of precisions, in plain PyTorch."""

from typing import Any

import torch

from src.evaluation.config import PRECISIONS, Precision

TYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


def choose_precision(asked: Precision | None, run: dict[str, Any]) -> str:
    """The precision that is ``asked`` for, else that of the weights' ``run``, else ``32-true``."""
    return asked or (run["precision"] if run.get("precision") in PRECISIONS else "32-true")


def in_precision(precision: str, device: str) -> tuple[torch.dtype, torch.autocast]:
    """The type of the weights in ``precision``, and the context in which the model computes."""
    bits, _, kind = precision.partition("-")
    mixed = kind == "mixed"
    context = torch.autocast(device, TYPES[bits] if mixed else torch.bfloat16, enabled=mixed)
    return torch.float32 if mixed else TYPES[bits], context
