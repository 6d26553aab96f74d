"""The LightningModule: the loss of a batch, its gradient's norm, and the evaluation of both splits."""

from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.kernels.install import has_fast_kernels
from src.kernels.loss import fused_loss
from src.model.architectures import build_model
from src.model.config import GPTConfig
from src.training.config import OptimizerConfig, ScheduleConfig
from src.training.finite_guard import StepSoFar, stop
from src.training.optim import build_optimizer, learning_rate_at
from src.checkpoint.position import own_data, rescale_position, restore_position, write_position, write_run
from src.training.sharded import FullyShardedStrategy, share_out

EVAL_SPLITS = ("val", "train")  # the order of TextDataModule.eval_dataloaders
EVAL_LOSS = {"val": "val/loss", "train": "train/eval_loss"}


class PretrainingModule(LightningModule):
    """Trains a :class:`~src.model.gpt.GPT`, its ``net``, to predict the next token.

    ``model``, ``optimizer`` and ``schedule`` are the fields of GPTConfig, OptimizerConfig and ScheduleConfig, as
    dictionaries or as those dataclasses. They are kept in the checkpoint as plain dictionaries, so
    ``PretrainingModule.load_from_checkpoint(path)`` needs nothing else.

    Logged with every ``trainer.log_every_n_steps``-th optimizer step, counted from 1: ``train/loss`` (mean over the
    step's micro-batches), ``grad_norm`` (before clipping), ``lr``, ``tokens_seen``, ``epoch`` (fractional).
    Logged by every evaluation: ``val/loss`` and ``train/eval_loss``, in nats per token over all tokens evaluated.
    """

    def __init__(
        self,
        model: GPTConfig | dict[str, Any],
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        schedule: ScheduleConfig | dict[str, Any] | None = None,
        seed: int = 123,
    ) -> None:
        super().__init__()
        given = {"model": model, "optimizer": optimizer or {}, "schedule": schedule or {}}
        plain = {key: asdict(value) if is_dataclass(value) else dict(value) for key, value in given.items()}
        self.save_hyperparameters({**plain, "seed": seed}, logger=False)
        self.optimizer_config = OptimizerConfig(**plain["optimizer"])
        self.schedule_config = ScheduleConfig(**plain["schedule"])
        self.seed = seed
        self.net = build_model(GPTConfig(**plain["model"]))
        self.tokens_seen = 0
        self.steps_made = 0  # by this process
        self.schedule_steps: float | None = None  # that the schedule is laid out over; None: those of this run
        self.skipped_batches: set[int] = set()  # left out, counted from the run's first batch
        self.evaluated_step: int | None = None
        self.evaluated: dict[str, float] = {}  # the losses of that step
        self.evaluated_tokens: dict[str, int] = {}  # of each split, that they are the mean over
        self._eval_sums: dict[str, Tensor] = {}  # split -> sum of losses, number of tokens
        self._step = StepSoFar()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def loss(self, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats, the mean or sum over ``targets`` ``(B, T)``, of the predictions from ``inputs``."""
        if has_fast_kernels(self.net):
            return fused_loss(self.net, inputs, targets, reduction)
        logits = self.net(inputs)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)

    @property
    def epochs_seen(self) -> float:
        """Epochs trained so far, fractions included; 0 before the first batch."""
        batches = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return batches / self.trainer.num_training_batches if batches else 0.0

    def configure_model(self) -> None:
        strategy = self._trainer and self._trainer.strategy  # none where a checkpoint is only loaded
        if isinstance(strategy, FullyShardedStrategy) and not isinstance(self.net, FSDPModule):
            share_out(self.net, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.net, self.optimizer_config)
        if self.schedule_steps is None:
            self.schedule_steps = self.trainer.estimated_stepping_batches
        total, peak, schedule = self.schedule_steps, self.optimizer_config.learning_rate, self.schedule_config
        scheduler = LambdaLR(optimizer, lambda step: learning_rate_at(step, total, peak, schedule) / peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        self._step = StepSoFar()  # what a step that failed has left
        restore_position(self.trainer)
        # Restored optimizers and schedules bring their old numbers along; those of this run's config hold.
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        fresh = build_optimizer(self.net, self.optimizer_config).param_groups
        scheduler.base_lrs = [group["lr"] for group in fresh]
        for group, new in zip(optimizer.param_groups, fresh, strict=True):
            group |= {key: value for key, value in new.items() if key not in ("params", "fused")}  # as its state lies
            group |= {"initial_lr": new["lr"], "lr": new["lr"] * scheduler.lr_lambdas[0](self.global_step)}

    @property
    def _batch(self) -> int:
        """The current batch, counted from the run's first."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of (seed, micro-batch, rank): whatever else draws random numbers cannot change it.
        position = [self.seed, self._batch, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        inputs, targets = batch
        if self._batch in self.skipped_batches:  # None is nothing for Lightning where several processes train
            return None if self.trainer.world_size == 1 else 0 * self.net(torch.zeros_like(inputs)).sum()
        loss = self.loss(inputs, targets)
        self._step.add(self._batch, inputs, loss.detach())
        self.tokens_seen += inputs.numel() * self.trainer.world_size
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping refuses fused optimizers under mixed precision; the norm is wanted anyway.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        if not self._step.losses:  # all skipped: the optimizer moves nothing
            optimizer.zero_grad()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        losses = torch.stack(self._step.losses) if self._step.losses else torch.zeros(1, device=self.device)
        losses = self.trainer.strategy.reduce(losses, reduce_op="mean")  # over the processes: all of them stop, or none
        finite = losses.isfinite().all()
        if scaler is None:  # which leaves such a step out by itself, and lowers its scale
            finite &= norm.isfinite()
        if not finite:
            stop(self.trainer, self._step, norm.item(), optimizer.param_groups[0]["lr"])
        if gradient_clip_val and str(gradient_clip_algorithm or "norm").endswith("value"):
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val and norm > gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.steps_made += 1
        if self._step.losses:  # not all skipped
            self.log("train/loss", losses.mean())
        self._step = StepSoFar()
        metrics = {
            "step": self.global_step + 1,
            "epoch": self.epochs_seen,
            "grad_norm": norm,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_seen": self.tokens_seen,
        }
        self.log_dict({key: self._exact(value) for key, value in metrics.items()})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.trainer.optimizers[0].zero_grad()  # now: Lightning would keep the gradients through the next forward pass

    def on_validation_epoch_start(self) -> None:
        self._eval_sums = {}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, targets = batch
        loss = self.loss(inputs, targets, reduction="sum")
        # One tensor for all batches: a small one that lies between large buffers keeps their memory from being reused.
        sums = self._eval_sums.setdefault(EVAL_SPLITS[dataloader_idx], self._exact([0.0, 0.0]))
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
        position = {"step": self._exact(self.global_step), "tokens_seen": self._exact(self.tokens_seen)}
        self.log_dict(losses | position)
        self.evaluated_step = self.global_step
        self.evaluated = {key: loss.item() for key, loss in losses.items()}

    def _exact(self, value: Any) -> Tensor:
        """``value`` in the widest float of this device: float32 holds no token count beyond 16,777,216."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.as_tensor(value, dtype=dtype, device=self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["schedule_steps"] = self.schedule_steps
        checkpoint["skipped_batches"] = sorted(self.skipped_batches)
        write_position(self.trainer, checkpoint)
        write_run(self.trainer, checkpoint, self.evaluated if self.evaluated_step == self.global_step else {})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and (data := own_data(self.trainer)):
            rescale_position(checkpoint, data.batch_windows)
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        self.skipped_batches |= set(checkpoint.get("skipped_batches", []))
