"""Perplexity per token, and bits per byte of text."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from src.tokenizer import token_byte_counts


class Perplexity(Callback):
    """Logs ``val/perplexity`` and ``train/perplexity``, the exponentials of the evaluation losses, and
    ``val/bits_per_byte``, which is comparable across tokenizers (Gao et al. 2020, section 3.1)."""

    def __init__(self) -> None:
        self._bytes_of: Tensor | None = None
        self._counts: Tensor | None = None  # bytes and tokens of the validation split so far

    def on_validation_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64, device=pl_module.device)
        if self._bytes_of is None:
            tokenizer = getattr(trainer.datamodule, "tokenizer", None)
            self._bytes_of = torch.from_numpy(token_byte_counts(tokenizer)).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:
            assert self._bytes_of is not None and self._counts is not None
            counted = batch[1] >= 0  # (B, T)
            of_each = self._bytes_of[batch[1].clamp(min=0)] * counted  # (B, T)
            self._counts += torch.stack([of_each.sum(), counted.sum()])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        losses = pl_module.eval_losses()
        for split, loss in losses.items():
            pl_module.log(f"{split}/perplexity", loss.exp())
        if "val" in losses:
            size, tokens = trainer.strategy.reduce(self._counts, reduce_op="sum")
            pl_module.log("val/bits_per_byte", losses["val"] / (size / tokens * math.log(2)))
