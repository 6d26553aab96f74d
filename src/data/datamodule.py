"""The path of one batch: corpus, split, tokens, windows, loader."""

import signal
from itertools import islice
from typing import Any

import numpy as np
import tiktoken
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from src.data.config import DataConfig
from src.data.shard_check import ShardCheck
from src.data.shards import ShardTokens
from src.data.tokens import read_split
from src.data.windows import RankSampler, RankWindows, SeededSampler, SlidingWindowDataset
from src.tokenizer import gpt2_tokenizer


def _leave_signals_to_the_run(worker: int) -> None:
    """Schedulers signal all processes of a job; a run that is to save first still needs its workers, and stops them.

    After a minute SIGTERM counts all the same: it is also what a process sends at last to workers that hang.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


class TextDataModule(LightningDataModule):
    """Batches ``(inputs, targets)``, each ``(batch_size, context_length)`` int64, from raw text or shards of tokens.

    Takes the fields of :class:`~src.data.config.DataConfig` as keywords. Training windows lie ``stride`` apart; those
    of the validation split never overlap, so that each of its tokens counts once. ``eval_batches`` limits both
    evaluation loaders (None: the whole split). Where ``ranks`` processes train together, a batch is that of all of
    them, ``ranks * batch_size`` windows, and this one, ``rank``, has its share.

    Raises:
        ValueError: an impossible setting; on ``setup``, a text or shards that cannot be read or are too short; while
            it trains, or at the end of that, shards that are not what their manifest says.
    """

    def __init__(
        self,
        *,
        eval_batches: int | None = None,
        tokenizer: tiktoken.Encoding | None = None,
        rank: int = 0,
        ranks: int = 1,
        **config: Any,
    ) -> None:
        super().__init__()
        self.config = DataConfig(**config)
        self.tokenizer = tokenizer or gpt2_tokenizer()
        self.eval_batches = eval_batches
        self.rank, self.ranks = rank, ranks
        self.corpus_sha256: str | None = None
        self.train_windows: SlidingWindowDataset | None = None
        self.val_windows: SlidingWindowDataset | None = None
        self._sampler: SeededSampler | None = None
        self._resumed = (0, 0)
        self._shard_check = ShardCheck([])

    def prepare_data(self) -> None:
        if self.config.path is None and self.config.url is not None:
            self.setup()  # one process fetches, the others find it in the cache

    def setup(self, stage: str | None = None) -> None:
        if self.train_windows is not None:
            return
        train, val, self.corpus_sha256 = read_split(self.config, self.tokenizer, self.config.train_ratio)
        self._check(train, val)
        if self.config.format == "shards" and self.rank == 0:
            self._shard_check = ShardCheck([*train.paths, *val.paths])
        context_length = self.config.context_length
        self.train_windows = SlidingWindowDataset(train, context_length, self.config.stride or context_length)
        self.val_windows = SlidingWindowDataset(val, context_length, context_length)

    @property
    def batch_windows(self) -> int:
        """Windows in a batch of all processes."""
        return self.config.batch_size * self.ranks

    def train_dataloader(self) -> DataLoader:
        self._shard_check.start()
        self._sampler = SeededSampler(len(self.train_windows), self.config.shuffle, self.config.seed)
        self._sampler.resume_at(*self._resumed)
        share = RankSampler(self._sampler, self.config.batch_size, self.rank, self.ranks)
        return self._loader(self.train_windows, sampler=share, drop_last=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._shard_check.check()
        return batch

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self._shard_check.finish()

    def val_dataloader(self) -> list[DataLoader]:
        return self.eval_dataloaders(self.eval_batches)

    def eval_dataloaders(self, batches: int | None) -> list[DataLoader]:
        """Loaders of the validation split and of the training split, without shuffling.

        ``batches`` of each, or all of them. Of the training split they are the first ones of epoch 0, so they are
        drawn from everywhere in it, and every evaluation sees the same.
        """
        val, train = self.val_windows, self.train_windows
        if batches is not None:
            count = batches * self.batch_windows
            first_epoch = SeededSampler(len(train), self.config.shuffle, self.config.seed)
            val = Subset(val, range(min(count, len(val))))
            train = Subset(train, list(islice(first_epoch, count)))
        return [
            self._loader(RankWindows(windows, self.config.batch_size, self.rank, self.ranks))
            for windows in (val, train)
        ]

    def state_dict(self) -> dict[str, int]:
        """How far training has come in the data: the epoch and the batches of it already trained on."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if batches >= self.trainer.num_training_batches:
            return {"epoch": self._sampler.epoch + 1, "batches": 0, "batch_windows": self.batch_windows}
        return {"epoch": self._sampler.epoch, "batches": batches, "batch_windows": self.batch_windows}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        windows = state_dict.get("batch_windows", self.batch_windows)
        self._resumed = (state_dict["epoch"], state_dict["batches"] * windows)

    def fixed_values(self) -> dict[str, Any]:
        """What the order and the meaning of the batches depend on, by the names of the overrides."""
        config = self.config
        keys = ["batch_size", "train_ratio", "shuffle", *(["special_tokens"] if config.format == "text" else [])]
        values = {key: getattr(config, key) for key in keys}
        values |= {"context_length": config.context_length, "stride": config.stride or config.context_length}
        return {
            **{f"data.{key}": value for key, value in values.items()},
            "seed": config.seed,
            "tokenizer": self.tokenizer.name,
            "data_sha256": self.corpus_sha256,
        }

    def token_offsets(self, epoch: int, batch: int) -> list[int]:
        """Where in the training tokens each window of a batch starts."""
        order = SeededSampler(len(self.train_windows), self.config.shuffle, self.config.seed)
        order.resume_at(epoch, batch * self.batch_windows)
        return [self.train_windows.stride * index for index in islice(order, self.batch_windows)]

    def summary(self) -> dict[str, str]:
        """Windows, batches and tokens of each split, for the start card."""
        lines = {}
        for name, windows, drop_last in ("train", self.train_windows, True), ("val", self.val_windows, False):
            batches = len(windows) // self.batch_windows if drop_last else -(-len(windows) // self.batch_windows)
            lines[name] = f"{len(windows):,} windows in {batches:,} batches, {len(windows.tokens):,} tokens"
        seen = len(self.train_windows) // self.batch_windows * self.batch_windows * self.config.context_length
        repeats = seen / len(self.train_windows.tokens)
        lines["train"] += f", each seen {repeats:.2f} times per epoch on average"
        return lines

    def _check(self, train: np.ndarray | ShardTokens, val: np.ndarray | ShardTokens) -> None:
        context_length, source = self.config.context_length, self.config.source
        short = [
            (name, len(part))
            for name, part in (("training", train), ("validation", val))
            if len(part) <= context_length
        ]
        if short:
            fits = min(len(train), len(val)) - 1
            cure = f"model.context_length={fits} or more text" if fits >= 1 else "more text"
            have = " and ".join(f"{count} {name} tokens" for name, count in short)
            raise ValueError(
                f"data.path={source} has {have}; one window needs context_length + 1 = {context_length + 1}: {cure}"
            )
        windows = len(SlidingWindowDataset(train, context_length, self.config.stride or context_length))
        if windows < self.batch_windows:
            asked = f"data.batch_size={self.config.batch_size}{f' on {self.ranks} devices' if self.ranks > 1 else ''}"
            fits = windows // self.ranks
            cure = f"data.batch_size={fits}" if fits else f"trainer.devices={windows}"
            raise ValueError(
                f"{asked} is more than the {windows} training windows of data.path={source}: "
                f"{cure}, a smaller data.stride or more text"
            )

    def _loader(self, dataset, **options) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            persistent_workers=self.config.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_run,
            **options,
        )
