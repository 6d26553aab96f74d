"""What a loss means: perplexity per token, and bits per byte of text."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from src.tokenizer import token_byte_counts


class Perplexity(Callback):
    """Logs ``val/perplexity`` and ``train/perplexity``, exp of each split's evaluation loss, and ``val/bits_per_byte``,
    which compares across tokenizers (Gao et al. 2020, section 3.1)."""

    def __init__(self) -> None:
        self._bytes_of: Tensor | None = None
        self._bytes = self._tokens = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bytes = self._tokens = 0
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
            targets = batch[1]
            self._bytes += self._bytes_of[targets].sum()
            self._tokens += targets.numel()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = pl_module.eval_losses()
        for split, loss in losses.items():
            self.log(f"{split}/perplexity", loss.exp())
        if "val" in losses:
            bytes_per_token = trainer.strategy.reduce(self._bytes / self._tokens, reduce_op="mean")
            self.log("val/bits_per_byte", losses["val"] / (bytes_per_token * math.log(2)))
