"""Tasks of lm-eval, and losses on other texts, while the model learns."""

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from pydantic import Field

from src.checkpoint.position import own_data
from src.config import Config, refuse
from src.data.config import DataConfig
from src.data.corpus import read_corpus
from src.data.tokens import split_tokens
from src.device import in_precision
from src.evaluation.config import problems_of_tasks
from src.evaluation.losses import text_loss
from src.model.gpt import GPT
from src.tokenizer import gpt2_tokenizer
from src.training.sharded import whole_net

log = logging.getLogger(__name__)


class TasksConfig(Config):
    section: ClassVar[str] = "callbacks.tasks"

    names: tuple[str, ...] = Field(default=(), examples=[["lambada_openai", "hellaswag"]])
    folder: str | None = None
    limit: int | None = Field(default=100, ge=1)
    texts: dict[str, str] = Field(default_factory=dict, examples=["{code: my_code.txt}"])
    every_steps: int | None = Field(default=None, ge=1)


class Tasks(Callback):
    """Scores the model on lm-eval's tasks called ``names``, of which ``folder`` may hold some, and on whole ``texts``,
    paths by their names. It does so with each evaluation or, with ``every_steps``, with the first evaluation, with each
    that is at least so many optimizer steps later, and with that of the last step.

    The loggers get ``tasks/<task>_<metric>`` over the first ``limit`` examples of a task (None: all), and
    ``texts/<name>_loss`` in nats per token. Both are computed as ``python -m src.evaluate`` does, on rank 0.

    Raises:
        ValueError: lm-eval, a task or a text is missing or cannot be read, or a number is out of range.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        folder: str | None = None,
        limit: int | None = 100,
        texts: Mapping[str, str] | None = None,
        every_steps: int | None = None,
    ) -> None:
        self.config = TasksConfig(
            names=tuple(names), folder=folder, limit=limit, texts=dict(texts or {}), every_steps=every_steps
        )
        keys = "callbacks.tasks.names", "callbacks.tasks.folder"
        refuse(problems_of_tasks(self.config.names, folder, *keys))
        self._corpora = {}
        for name, path in self.config.texts.items():
            try:
                self._corpora[name] = read_corpus(path)
            except ValueError as error:
                reason = str(error).split("; use ")[0].replace("data.path", f"callbacks.tasks.texts.{name}")
                raise ValueError(f"{reason}; use 'callbacks.tasks.texts={{{name}: <a text file>}}'") from None
        self._tasks = None
        if self.config.names:
            from src.evaluation.tasks import load_tasks  # lm-eval takes seconds to import, and may not be installed

            self._tasks = load_tasks(self.config.names, folder, keys[0])
        self._tokens: dict[str, Any] = {}
        self._step: int | None = None  # of the latest scores

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        last = trainer.state.fn == "fit" and step >= trainer.estimated_stepping_batches
        due = last or self._step is None or step - self._step >= (self.config.every_steps or 0)
        if trainer.sanity_checking or not due or not (self._tasks or self._corpora):
            return
        self._step = step
        net = whole_net(pl_module.net, trainer)
        if trainer.is_global_zero and net is not None:
            with isolate_rng(), redirect_stderr(io.StringIO()):  # whose bars would write over that of the run
                pl_module.log_exactly(**self._scores(net, trainer, pl_module))

    def _scores(self, net: GPT, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        data = own_data(trainer)
        tokenizer, config = (data.tokenizer, data.config) if data else (gpt2_tokenizer(), DataConfig(batch_size=8))
        _, autocast = in_precision(str(trainer.precision), pl_module.device.type)
        found, sizes = {}, {}
        with autocast:
            for name, corpus in self._corpora.items():
                if name not in self._tokens:
                    self._tokens[name], _ = split_tokens(
                        corpus, 1.0, tokenizer, config.special_tokens, config.cache_dir
                    )
                loss = text_loss(net, self._tokens[name], net.config.context_length, batch_size=config.batch_size)
                found[f"texts/{name}_loss"], sizes[f"texts/{name}_tokens"] = loss.loss, loss.tokens
            if self._tasks:
                from src.evaluation.harness import HarnessLM
                from src.evaluation.tasks import run_tasks

                adapter = HarnessLM(net, tokenizer, config.batch_size)
                for name, score in run_tasks(self._tasks, adapter, self.config.limit).items():
                    (sizes if name.endswith("_examples") else found)[f"tasks/{name}"] = score
        shown = [f"{name} {score:.4f}" for name, score in found.items()]
        shown += [f"{name} {size:,}" for name, size in sizes.items()]
        log.info("step %d: %s", trainer.global_step, ", ".join(shown))
        return found
