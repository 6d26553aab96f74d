"""The parts without the command: a module in one's own Trainer, with one's own data."""

import json

import lightning.pytorch as L
import pytest
import torch
from conftest import story_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from src.callbacks.console import Console
from src.callbacks.perplexity import Perplexity
from src.callbacks.plots import LossPlot
from src.callbacks.text_samples import TextSamples
from src.callbacks.throughput import Throughput
from src.data.datamodule import TextDataModule
from src.data.windows import SlidingWindowDataset
from src.interop.weights import load_weights
from src.model.config import GPTConfig
from src.tokenizer import encode
from src.training.finite_guard import NonFiniteError
from src.training.module import PretrainingModule

MODEL = GPTConfig(context_length=16, emb_dim=32, n_heads=4, n_layers=1)


class OwnData(L.LightningDataModule):
    def __init__(self, loader: DataLoader) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader:
        return self.loader

    def val_dataloader(self) -> DataLoader:
        return self.loader


@pytest.fixture
def loader() -> DataLoader:
    return DataLoader(SlidingWindowDataset(encode(story_of(300)), 16, 16), batch_size=4)


@pytest.fixture
def trainer(tmp_path):
    def make(**options) -> L.Trainer:
        callbacks = [
            ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1),
            *(Console(), Perplexity(), Throughput(), LossPlot(), TextSamples(["So"], max_new_tokens=2)),
        ]
        options = {
            "max_steps": 5,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "logger": CSVLogger(tmp_path),
            **options,
        }
        return L.Trainer(callbacks=callbacks, default_root_dir=tmp_path, enable_progress_bar=False, **options)

    return make


@pytest.mark.parametrize("own", ["loaders", "data module"])
def test_own_trainer_and_data(trainer, tmp_path, loader, own):
    module, fitted = PretrainingModule(MODEL, {"learning_rate": 1e-3}), trainer()
    data = {"datamodule": OwnData(loader)} if own == "data module" else {"train_dataloaders": loader}
    fitted.fit(module, **data, **({} if own == "data module" else {"val_dataloaders": loader}))
    assert fitted.global_step == 5
    metrics = {key: value.item() for key, value in fitted.callback_metrics.items()}
    assert metrics["train/loss"] < 11
    assert metrics["tokens_seen"] == len(loader.dataset) * 16 == 18 * 16
    assert metrics["perf/tokens_per_second"] > 0
    assert "So" in (tmp_path / "samples.md").read_text()
    loaded = PretrainingModule.load_from_checkpoint(tmp_path / "step=4.ckpt")
    assert loaded.net.config == MODEL
    net = load_weights(tmp_path / "step=4.ckpt")  # which has no SHA-256
    assert net.config == MODEL
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in loaded.net.cpu().state_dict().items())
    again = PretrainingModule(MODEL, {"learning_rate": 1e-3})
    resumed = trainer()
    resumed.fit(again, **data, ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
    assert resumed.global_step == 5


def test_own_trainer_with_the_projects_data(trainer, tmp_path, long_text):
    """The data module takes accumulation from the Trainer: an epoch is a whole number of steps."""
    data = TextDataModule(path=str(long_text), context_length=16, batch_size=3)
    fitted = trainer(max_steps=-1, max_epochs=1, accumulate_grad_batches=3)
    fitted.fit(PretrainingModule(MODEL), datamodule=data)
    windows = len(data.train_windows)
    assert fitted.global_step == windows // 9
    assert windows % 9 >= 3


def test_non_finite_loss_of_own_data(trainer, tmp_path, loader):
    module = PretrainingModule(MODEL, {"learning_rate": 1e30})
    with pytest.raises(NonFiniteError):
        trainer(num_sanity_val_steps=0).fit(module, loader)
    (batch,) = json.loads((tmp_path / "non_finite.json").read_text())["batches"]
    assert [window["offset"] for window in batch["windows"]] == [None] * 4


def test_last_group_of_an_epoch_of_own_data_is_a_mean(trainer):
    """Nine batches, four per step: the ninth is a step of its own and counts as much as the others."""
    windows = SlidingWindowDataset(encode(story_of(300)), 16, 16)
    loader = DataLoader(torch.utils.data.Subset(windows, range(9)), batch_size=1)
    gradients = []

    def watch(optimizer, **_) -> None:  # the last hook before the update
        gradients.append(module.net.head.weight.grad.clone())

    model = GPTConfig(context_length=16, emb_dim=32, n_heads=4, n_layers=1, drop_rate=0.0)
    module = PretrainingModule(model, {"learning_rate": 1e-9, "weight_decay": 0.0})
    own = trainer(max_steps=-1, max_epochs=1, accumulate_grad_batches=4, num_sanity_val_steps=0, limit_val_batches=0)
    module.configure_gradient_clipping = watch
    own.fit(module, loader)
    inputs, targets = windows[8]
    module.zero_grad()
    module.loss(inputs[None], targets[None]).backward()
    assert torch.allclose(gradients[-1], module.net.head.weight.grad, atol=1e-5)
