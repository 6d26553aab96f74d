"""What the model writes, as it learns."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from src.generation.config import Sampling
from src.generation.decode import generate
from src.model.gpt import GPT
from src.tokenizer import gpt2_tokenizer, text_to_token_ids, token_ids_to_text
from src.training.sharded import whole_net

log = logging.getLogger(__name__)

PER_RUN = 10  # texts at least


class TextSamples(Callback):
    """Continues fixed prompts, greedily and by sampling: before training, after every ``every_n_epochs`` epochs, and
    after an evaluation where a tenth of the run has passed without.

    Written to the log, to ``samples.md`` in the trainer's root folder, and to TensorBoard as text. Draws come from a
    generator of its own, seeded by ``seed``, the step and the prompt's place in the list.

    Raises:
        ValueError: prompts that are no list of texts, or an impossible number.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = 25,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
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
        try:
            self.sampling = Sampling(
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
            )
        except ValueError as error:
            raise ValueError("\n".join(f"callbacks.text_samples.{line}" for line in str(error).splitlines())) from None
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.every_n_epochs = every_n_epochs
        self.seed = seed
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
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 or trainer.should_stop:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        net = whole_net(pl_module.net, trainer)
        if trainer.is_global_zero:
            self._write(net, trainer, pl_module)

    def _write(self, net: GPT, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        texts = [f"## step {step}, epoch {pl_module.epochs_seen:.2f}"]
        for prompt in self.prompts:
            for way, text in self._continuations(net, trainer, pl_module, prompt).items():
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

    def _continuations(self, net: GPT, trainer: Trainer, pl_module: LightningModule, prompt: str) -> dict[str, str]:
        tokenizer = getattr(trainer.datamodule, "tokenizer", None) or gpt2_tokenizer()
        special_tokens = getattr(getattr(trainer.datamodule, "config", None), "special_tokens", "parse")
        tokens = text_to_token_ids(prompt, tokenizer, special_tokens).to(pl_module.device)
        place = [self.seed, trainer.global_step, self.prompts.index(prompt)]
        state = np.random.SeedSequence(place).generate_state(1, np.uint64)
        generator = torch.Generator(pl_module.device).manual_seed(int(state[0]))
        drawn = ", ".join(
            f"{key.replace('_', '-')} {value:g}"
            for key, value in self.sampling
            if value is not None and (key != "repetition_penalty" or value != 1)
        )
        both = [[0.0], [self.sampling.temperature]]  # (2, 1): in one pass
        temperatures = torch.tensor(both, device=tokens.device)
        sampling = self.sampling.model_copy(update={"temperature": temperatures})
        rows = generate(
            net,
            tokens,
            self.max_new_tokens,
            sampling,
            generator,
            num_samples=2,
            vocab_size=tokenizer.n_vocab,
        )  # (2, T + max_new_tokens)
        return dict(zip(("greedy", drawn), (token_ids_to_text(row, tokenizer) for row in rows), strict=True))


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.split("\n"))
