"""What the model writes, as it learns."""

import logging
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from src.generation.decode import generate
from src.tokenizer import text_to_token_ids, token_ids_to_text

log = logging.getLogger(__name__)


class TextSamples(Callback):
    """Continues fixed prompts before training and after every ``every_n_epochs`` epochs, greedily and by sampling.

    Written to the log, to ``samples.md`` in the trainer's root folder, and to TensorBoard as text. Draws come from a
    generator of its own, seeded by ``seed`` and the step.

    Raises:
        ValueError: prompts that are no list of texts, or an impossible number.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = 25,
        every_n_epochs: int = 1,
        seed: int = 123,
    ) -> None:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
            raise ValueError(
                f"callbacks.text_samples.prompts={prompts} must be a list of texts, none of them empty: "
                f"'callbacks.text_samples.prompts=[\"Every effort moves you\"]'"
            )
        for key, value in ("max_new_tokens", max_new_tokens), ("every_n_epochs", every_n_epochs):
            if value < 1:
                raise ValueError(
                    f"callbacks.text_samples.{key}={value} must be at least 1, or ~callbacks.text_samples for none"
                )
        if temperature < 0 or (top_k or 0) < 0:
            raise ValueError(
                f"callbacks.text_samples.temperature={temperature} and .top_k={top_k} cannot be negative: "
                f"callbacks.text_samples.temperature=1.0 callbacks.text_samples.top_k=25"
            )
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self._written = 0  # bytes of samples.md

    def state_dict(self) -> dict[str, int]:
        return {"bytes": self._written}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._written = state_dict["bytes"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._sample(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 or trainer.should_stop:
            self._sample(trainer, pl_module)

    @rank_zero_only
    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        texts = [f"## step {step}, epoch {pl_module.epochs_seen:.2f}"]
        for prompt in self.prompts:
            for way, text in self._continuations(trainer, pl_module, prompt, step).items():
                log.info("%s | %s", way, text.replace("\n", " "))
                texts.append(f"**{way}**\n\n{_quoted(text)}")
        entry = "\n\n".join(texts)
        with Path(trainer.default_root_dir, "samples.md").open("ab") as file:
            if file.tell() > self._written:  # beyond the checkpoint that this run continues
                file.truncate(self._written)
            file.write(f"{entry}\n\n".encode())
            self._written = file.tell()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", entry, step)

    def _continuations(self, trainer: Trainer, pl_module: LightningModule, prompt: str, step: int) -> dict[str, str]:
        data = trainer.datamodule
        tokens = text_to_token_ids(prompt, data.tokenizer, data.config.special_tokens).to(pl_module.device)
        state = np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)
        generator = torch.Generator(pl_module.device).manual_seed(int(state[0]))
        ways = {"greedy": 0.0, f"temperature {self.temperature:g}, top-k {self.top_k}": self.temperature}
        temperatures = torch.tensor(list(ways.values()), device=tokens.device).unsqueeze(1)  # (2, 1): both in one pass
        rows = generate(
            pl_module.net, tokens.expand(2, -1), self.max_new_tokens, temperatures, self.top_k, generator
        )  # (2, T + max_new_tokens)
        return {way: token_ids_to_text(row, data.tokenizer) for way, row in zip(ways, rows, strict=True)}


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.split("\n"))
