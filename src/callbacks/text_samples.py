"""Texts that the model writes while it learns."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pydantic import Field

from src.callbacks.weight_averaging import averaged_weights
from src.config import Config
from src.generation.config import Sampling
from src.generation.decode import generate
from src.model.gpt import GPT
from src.tokenizer import gpt2_tokenizer, text_to_token_ids, token_ids_to_text
from src.training.sharded import whole_net

log = logging.getLogger(__name__)

PER_RUN = 10  # sample at least this often


class TextSampling(Sampling):
    section: ClassVar[str] = "callbacks.text_samples.sampling"


class TextSamplesConfig(Config):
    section: ClassVar[str] = "callbacks.text_samples"

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(examples=[["Every effort moves you"]])
    max_new_tokens: int = Field(default=50, ge=1)
    sampling: TextSampling
    every_n_epochs: int = Field(default=1, ge=1)
    seed: int = 123


class TextSamples(Callback):
    """Continues each of ``prompts`` by ``max_new_tokens`` tokens, once greedily and once with ``sampling``, which by
    default is a temperature of 1 and the 25 likeliest tokens. It does so before training, after every
    ``every_n_epochs`` epochs, and after an evaluation if a tenth of the run has passed since the last time.

    The texts go to the log, to ``samples.md`` in the trainer's root folder, and to each logger that has
    ``log_text(key, columns, data, step)`` with the arguments of Lightning's ``WandbLogger``. The weights are those that
    evaluations score. A generator of their own, seeded by ``seed``, the step and the prompt's index, makes the draws.

    Raises:
        ValueError: prompts that are not a list of texts, an empty prompt, or a number out of range.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 50,
        sampling: Mapping[str, Any] | Sampling | None = None,
        every_n_epochs: int = 1,
        seed: int = 123,
    ) -> None:
        self.config = TextSamplesConfig(
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            sampling=TextSampling(**dict(sampling or {"temperature": 1.0, "top_k": 25})),
            every_n_epochs=every_n_epochs,
            seed=seed,
        )
        self._step: int | None = None  # of the latest samples
        self._written = 0  # bytes of samples.md

    def state_dict(self) -> dict[str, Any]:
        return {"bytes": self._written, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written, self._step = state_dict["bytes"], state_dict.get("step")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._sample(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        since = trainer.global_step - (self._step or 0)
        if trainer.state.fn == "fit" and since * PER_RUN >= trainer.estimated_stepping_batches:
            self._sample(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.config.every_n_epochs == 0 or trainer.should_stop:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: Any) -> None:
        if self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        with averaged_weights(trainer):
            net = whole_net(pl_module.net, trainer)
            if trainer.is_global_zero and net is not None:
                self._write(net, trainer, pl_module)

    def _write(self, net: GPT, trainer: Trainer, pl_module: Any) -> None:
        texts = [f"## step {trainer.global_step}, epoch {pl_module.epochs_seen:.2f}"]
        for index in range(len(self.config.prompts)):
            for way, text in self._continuations(net, trainer, pl_module, index).items():
                log.info("%s | %s", way, text.replace("\n", " "))
                texts.append(f"**{way}**\n\n{_quoted(text)}")
        entry = "\n\n".join(texts)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.md").open("ab") as file:
            if file.tell() > self._written:  # beyond the checkpoint that this run resumes
                file.truncate(self._written)
            file.write(f"{entry}\n\n".encode())
            self._written = file.tell()
        for logger in trainer.loggers:
            if log_text := getattr(logger, "log_text", None):
                log_text("samples", columns=["text"], data=[[entry]], step=trainer.global_step)

    def _continuations(self, net: GPT, trainer: Any, pl_module: LightningModule, index: int) -> dict[str, str]:
        """The greedy and the sampled continuation of a prompt, by the way in which their tokens were chosen."""
        config, sampling = self.config, self.config.sampling
        tokenizer = getattr(trainer.datamodule, "tokenizer", None) or gpt2_tokenizer()
        special_tokens = getattr(getattr(trainer.datamodule, "config", None), "special_tokens", "parse")
        tokens = text_to_token_ids(config.prompts[index], tokenizer, special_tokens).to(pl_module.device)  # (1, T)
        state = np.random.SeedSequence([config.seed, trainer.global_step, index]).generate_state(1, np.uint64)
        generator = torch.Generator(pl_module.device).manual_seed(int(state[0]))
        temperatures = torch.tensor([[0.0], [sampling.temperature]], device=tokens.device)  # (2, 1): in one pass
        both = sampling.model_copy(update={"temperature": temperatures})
        rows = generate(
            net, tokens, config.max_new_tokens, both, generator, num_samples=2, vocab_size=tokenizer.n_vocab
        )  # (2, T + max_new_tokens)
        return dict(zip(("greedy", _named(sampling)), (token_ids_to_text(row, tokenizer) for row in rows), strict=True))


def _named(sampling: Sampling) -> str:
    """The settings of ``sampling`` that have an effect: ``temperature 1, top-k 25``."""
    settings = {key: value for key, value in vars(sampling).items() if value is not None}
    if settings["repetition_penalty"] == 1:
        del settings["repetition_penalty"]
    return ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in settings.items())


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.split("\n"))
