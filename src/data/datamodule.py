"""From a text to batches: corpus, split, tokens, windows, loaders."""

import signal
from collections.abc import Sequence
from itertools import islice
from typing import Any

import tiktoken
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from src.data.config import DataConfig, TokenizerConfig
from src.data.corpus import Corpus
from src.data.facts import facts_of
from src.data.lengths import check_lengths
from src.data.overlap import described_overlap
from src.data.shard_check import ShardCheck
from src.data.shards import ShardTokens
from src.data.tokens import read_split
from src.data.windows import RankSampler, RankWindows, SeededSampler, SlidingWindowDataset, evenly_spread
from src.tokenizer import gpt2_tokenizer
from src.tokenizer.encoding import unknown_tokens


def _leave_signals_to_the_run(worker: int) -> None:
    """Schedulers signal all processes of a job, but a run that saves first still needs its workers, and stops them.

    SIGTERM ends a worker after a minute, since it is also what the run sends to workers that hang.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


class TextDataModule(LightningDataModule):
    """Batches ``(inputs, targets)``, each ``(batch_size, context_length)`` int64, from raw text or shards of tokens.

    Takes the fields of :class:`~src.data.config.DataConfig` as keywords. Training windows are ``stride`` tokens apart.
    Validation windows never overlap, so each token counts once. An epoch is a whole number of optimizer steps of
    ``accumulate`` batches. With a ``world_size`` above 1, a batch of all processes has ``world_size * batch_size``
    windows, of which the process ``rank`` gets its share. A Trainer's values replace these three.

    Every evaluation scores the same windows: all validation windows and as many training windows, or at most
    ``eval_tokens`` tokens of each split, spread over it, or ``eval_batches`` batches of each split.

    Raises:
        ValueError: an impossible setting; in ``setup``, a text or shards that cannot be read or are too short; during
            training or at its end, shards that differ from their manifest.
    """

    def __init__(
        self,
        *,
        eval_tokens: int | None = None,
        eval_batches: int | None = None,
        tokenizer: tiktoken.Encoding | TokenizerConfig | None = None,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        **config: Any,
    ) -> None:
        super().__init__()
        self.config = DataConfig(**config)
        assert self.config.context_length is not None
        self.context_length = self.config.context_length
        self.tokenizer: tiktoken.Encoding  # made by setup
        self._tokenizer = tokenizer or gpt2_tokenizer()
        if isinstance(self._tokenizer, tiktoken.Encoding):
            self.tokenizer = self._tokenizer
        self.eval_tokens = eval_tokens
        self.eval_batches = eval_batches
        self.accumulate = accumulate
        self.rank, self.world_size = rank, world_size
        self.corpus_sha256: str | None = None
        self._corpus: Corpus | None = None
        self.train_windows: SlidingWindowDataset  # made by setup
        self.val_windows: SlidingWindowDataset
        self._sampler: SeededSampler  # made by train_dataloader
        self._start = (0, 0)  # epoch, and windows of it that are already trained on
        self._shard_check = ShardCheck([])

    def prepare_data(self) -> None:
        if self.config.path is None and self.config.url is not None:
            self.setup()  # one process downloads, the others find the file in the cache

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self.accumulate = self.trainer.accumulate_grad_batches
            self.rank, self.world_size = self.trainer.global_rank, self.trainer.world_size
        if self.corpus_sha256 is not None:
            return
        train, val, self.corpus_sha256, self.tokenizer, self._corpus = read_split(
            self.config, self._tokenizer, self.config.train_ratio
        )
        check_lengths(self.config, len(train), len(val), self.accumulate, self.world_size)
        if self.config.format == "shards" and self.rank == 0:
            assert isinstance(train, ShardTokens) and isinstance(val, ShardTokens)
            self._shard_check = ShardCheck([*train.paths, *val.paths])
        length = self.context_length
        stride = self.config.stride or length
        self.train_windows = SlidingWindowDataset(train, length, stride, stride if self.config.shift else 1)
        self.val_windows = SlidingWindowDataset(val, length, length)

    @property
    def windows_per_batch(self) -> int:
        """Windows in a batch of all processes."""
        return self.config.batch_size * self.world_size

    @property
    def windows_per_step(self) -> int:
        """Windows in an optimizer step."""
        return self.windows_per_batch * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_windows) // self.windows_per_step

    def train_dataloader(self) -> DataLoader:
        self._shard_check.start()
        self._sampler = self._order(*self._start)
        share = RankSampler(self._sampler, self.config.batch_size, self.rank, self.world_size)
        return self._loader(self.train_windows, sampler=share)

    def _order(self, epoch: int, windows: int) -> SeededSampler:
        """The order of training, from ``epoch`` on without its first ``windows``."""
        config = self.config
        of, shifts = len(self.train_windows), self.train_windows.shifts
        return SeededSampler(of, config.shuffle, config.seed, self.windows_per_step, epoch, windows, shifts)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._shard_check.check()
        return batch

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self._shard_check.finish()

    def val_dataloader(self) -> list[DataLoader]:
        """Loaders of the evaluated windows of the validation split and of the training split."""
        return [
            self._loader(RankWindows(Subset(windows, chosen), self.config.batch_size, self.rank, self.world_size))
            for windows, chosen in zip((self.val_windows, self.train_windows), self.evaluated_windows(), strict=True)
        ]

    def evaluated_windows(self) -> tuple[Sequence[int], Sequence[int]]:
        """The indices of the validation windows and of the training windows that every evaluation scores."""
        counts = len(self.val_windows), len(self.train_windows)
        if self.eval_batches is not None:
            val, train = (evenly_spread(count, self.eval_batches * self.windows_per_batch) for count in counts)
            return val, train
        most = None if self.eval_tokens is None else max(self.eval_tokens // self.context_length, 1)
        val = evenly_spread(counts[0], most)
        return val, evenly_spread(counts[1], len(val))

    def limit_evaluation(self, tokens: int) -> None:
        """Score at most ``tokens`` tokens of each split in every evaluation."""
        self.eval_tokens = tokens

    def state_dict(self) -> dict[str, int]:
        """The position in the data: the epoch and the batches of it already trained on."""
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.state_dict()["processed"]
        if batches >= self.trainer.num_training_batches:
            return {"epoch": self._sampler.epoch + 1, "batches": 0, "batch_windows": self.windows_per_batch}
        return {"epoch": self._sampler.epoch, "batches": batches, "batch_windows": self.windows_per_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        windows = state_dict.get("batch_windows", self.windows_per_batch)
        self._start = (state_dict["epoch"], state_dict["batches"] * windows)

    def fixed_values(self) -> dict[str, Any]:
        """The settings that a resumed run may not change, since its batches depend on them, by override."""
        return {
            **self.config.fixed_values(self.context_length),
            "seed": self.config.seed,
            "tokenizer": self.tokenizer.name,
            "data_sha256": self.corpus_sha256,
        }

    def token_offsets(self, epoch: int, batch: int) -> list[int]:
        """The place in the training tokens where each window of a batch starts."""
        order = self._order(epoch, batch * self.windows_per_batch)
        return [self.train_windows.start(index) for index in islice(order, self.windows_per_batch)]

    def summary(self) -> dict[str, str]:
        """What is in the text, windows and tokens of each split, and how many of them are evaluated, for the start
        card."""
        splits = {"val": self.val_windows, "train": self.train_windows}
        length, scored = self.context_length, []
        for (name, windows), chosen in zip(splits.items(), self.evaluated_windows(), strict=True):
            every = "all " if len(chosen) == len(windows) else ""
            scored.append(f"{every}{len(chosen):,} {name} windows ({len(chosen) * length:,} tokens)")
        train, batches = self.train_windows, self.steps_per_epoch * self.accumulate
        seen = self.steps_per_epoch * self.windows_per_step * length / len(train.tokens)
        val, facts = self.val_windows, {}
        if self._corpus is not None:
            facts = facts_of(self._corpus, len(train.tokens) + len(val.tokens))
        unknown = unknown_tokens(val.tokens, self.tokenizer)
        lacking = f"; {unknown / len(val.tokens):.1%} of the val tokens are characters it lacks" if unknown else ""
        return {
            **facts,
            "train": f"{len(train):,} windows in {batches:,} batches, {len(train.tokens):,} tokens, "
            f"each seen {seen:.2f} times per epoch on average",
            "val": f"{len(val):,} windows, {len(val.tokens):,} tokens; "
            f"{described_overlap(train.tokens, val.tokens, length)}",
            "tokenizer": f"{self.tokenizer.name}, {self.tokenizer.n_vocab:,} tokens{lacking}",
            "evaluation": " and ".join(scored),
        }

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
