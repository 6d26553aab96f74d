"""The LightningModule: the loss of a batch, the optimizer and its schedule, and the evaluation of both splits."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.kernels.install import can_fuse_loss
from src.kernels.loss import fused_loss
from src.model.architectures import build_model
from src.model.config import GPTConfig
from src.training.finite_guard import FiniteGuard
from src.training.optim import apply_settings, build_optimizer, learning_rate_at
from src.training.sections import OptimizerConfig, ScheduleConfig
from src.training.sharded import shard

EVAL_SPLITS = ("val", "train")  # the order of TextDataModule.val_dataloader
EVAL_LOSS = {"val": "val/loss", "train": "train/eval_loss"}


class PretrainingModule(LightningModule):
    """Trains a :class:`~src.model.gpt.GPT`, its ``net``, to predict the next token.

    ``model``, ``optimizer`` and ``schedule`` are configs or dictionaries of their fields. The checkpoint keeps them as
    plain dictionaries, so ``PretrainingModule.load_from_checkpoint(path)`` needs nothing else. The schedule is laid out
    over ``total_steps`` optimizer steps, by default those of the Trainer. Batches in ``skip_batches``, counted from the
    first one of the run, are not trained on.

    Logged with every ``trainer.log_every_n_steps``-th optimizer step, counted from 1: ``train/loss`` (mean over the
    step's micro-batches), ``lr``, ``tokens_seen``, ``epoch`` (fractional).
    Logged by every evaluation: ``val/loss`` and ``train/eval_loss``, in nats per token over all tokens evaluated.
    """

    def __init__(
        self,
        model: GPTConfig | dict[str, Any],
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        schedule: ScheduleConfig | dict[str, Any] | None = None,
        seed: int = 123,
        total_steps: float | None = None,
        skip_batches: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.model_config = model if isinstance(model, GPTConfig) else GPTConfig(**model)
        self.optimizer_config = OptimizerConfig(**dict(optimizer or {}))
        self.schedule_config = ScheduleConfig(**dict(schedule or {}))
        configs = {"model": self.model_config, "optimizer": self.optimizer_config, "schedule": self.schedule_config}
        plain = {name: config.model_dump(mode="json") for name, config in configs.items()}
        self.save_hyperparameters({**plain, "seed": seed}, logger=False)
        self.seed = seed
        self.total_steps = total_steps
        self.skip_batches = set(skip_batches)
        self.net = build_model(self.model_config)
        self.tokens_seen = 0
        self.steps_made = 0  # by this process
        self.step_losses: list[Tensor] = []  # of the micro-batches of the optimizer step under way
        self.evaluated_step: int | None = None
        self.evaluated: dict[str, float] = {}  # the losses of that step
        self.best_val_loss = math.inf  # of the evaluations of this process
        self.evaluated_tokens: dict[str, int] = {}  # of each split: what these losses are the mean over
        self._eval_sums: dict[str, Tensor] = {}  # split -> sum of losses, number of tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def loss(self, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats, the mean or sum over ``targets`` ``(B, T)``, of the predictions from ``inputs``."""
        if can_fuse_loss(self.net):
            return fused_loss(self.net, inputs, targets, reduction)
        logits = self.net(inputs)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)

    # Training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of (seed, micro-batch, rank): whatever else draws random numbers cannot change it.
        position = [self.seed, self.batch_index, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch  # each (B, T)
        if self.batch_index in self.skip_batches:
            return 0 * self.net(torch.zeros_like(inputs)).sum()  # every rank of a sharded model needs a backward pass
        loss = self.loss(inputs, targets)
        self.step_losses.append(loss.detach())
        self.tokens_seen += inputs.numel() * self.trainer.world_size
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.steps_made += 1
        if self.step_losses:
            self.log("train/loss", self.trainer.strategy.reduce(torch.stack(self.step_losses), reduce_op="mean").mean())
        self.step_losses = []
        self.log_exactly(
            step=self.global_step + 1,
            epoch=self.epochs_seen,
            lr=optimizer.param_groups[0]["lr"],
            tokens_seen=self.tokens_seen,
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.trainer.optimizers[0].zero_grad()  # now: Lightning would keep the gradients through the next forward pass

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self._eval_sums = {}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, targets = batch  # each (B, T)
        loss = self.loss(inputs, targets, reduction="sum")
        # One tensor for all batches: a small one that lies between large buffers keeps their memory from being reused.
        sums = self._eval_sums.setdefault(EVAL_SPLITS[dataloader_idx], self._exact(loss.new_zeros(2)))
        sums += torch.stack([loss, (targets >= 0).sum()])

    def eval_losses(self) -> dict[str, Tensor]:
        """Loss in nats per token of each split of the current evaluation: sum of losses over number of tokens."""
        losses = {}
        for split, sums in self._eval_sums.items():
            loss, tokens = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
            losses[split] = loss / tokens
            self.evaluated_tokens[split] = int(tokens.item())
        return losses

    def on_validation_epoch_end(self) -> None:
        losses = {EVAL_LOSS[split]: loss for split, loss in self.eval_losses().items()}
        self.log_dict(losses)
        self.log_exactly(step=self.global_step, tokens_seen=self.tokens_seen)
        self.evaluated_step = self.global_step
        self.evaluated = {key: loss.item() for key, loss in losses.items()}
        self.best_val_loss = min(self.best_val_loss, self.evaluated.get("val/loss", math.inf))

    # Optimizer, schedule, devices

    def configure_callbacks(self) -> list[Callback]:
        callbacks = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  # not declared by Lightning
        guarded = any(isinstance(callback, FiniteGuard) for callback in callbacks)
        return [] if guarded else [FiniteGuard()]  # in a Trainer of the user's own, which clips by itself

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.net, self.optimizer_config)
        if self.total_steps is None:
            self.total_steps = self.trainer.estimated_stepping_batches
        peak = self.optimizer_config.learning_rate
        scheduler = LambdaLR(optimizer, lambda step: self.learning_rate_at(step) / peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        assert self.total_steps is not None
        return learning_rate_at(step, self.total_steps, self.optimizer_config.learning_rate, self.schedule_config)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):  # of FullyShardedStrategy
            torch.manual_seed(self.seed)
            shard(self.net, self.device_mesh["data_parallel"], str(self.trainer.precision))

    def on_train_start(self) -> None:
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        apply_settings(self.trainer.optimizers[0], scheduler, build_optimizer(self.net, self.optimizer_config))

    # Position

    @property
    def batch_index(self) -> int:
        """Index of the current micro-batch, counted from 0 over the whole run."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    @property
    def epochs_seen(self) -> float:
        """Epochs trained so far, fractions included; 0 before the first batch."""
        batches = self.batch_index + 1
        return batches / self.trainer.num_training_batches if batches else 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["schedule_steps"] = self.total_steps
        checkpoint["skipped_batches"] = sorted(self.skip_batches)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint.get("tokens_seen", 0)

    def log_exactly(self, **values: float) -> None:
        """Log ``values`` in the widest float of the device: float32 holds no token count above 16,777,216."""
        self.log_dict({key: self._exact(value) for key, value in values.items()})

    def _exact(self, value: Any) -> Tensor:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        if isinstance(value, Tensor):
            return value.to(self.device, dtype)
        return torch.full((), value, dtype=dtype, device=self.device)  # copying a number to a GPU would wait for it
