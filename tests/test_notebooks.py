import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_interop import bundle, openai_tensors, write_hparams

from src.interop.book import write_book
from src.interop.huggingface import write_huggingface
from src.interop.weights import save_weights
from src.model.config import GPTConfig
from src.model.gpt import GPT

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run(name: str) -> str:
    """What a notebook prints, from top to bottom; every figure that it draws is there."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}).execute()
    figures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(figures) == sum("plt." in cell.source and cell.cell_type == "code" for cell in notebook.cells)
    return "".join(
        out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream"
    )


@pytest.mark.slow
def test_tour():
    assert "Every effort moves you" in run("01_tour.ipynb")


@pytest.mark.slow
def test_weights_of_a_small_model_without_a_network(monkeypatch):
    monkeypatch.delenv("WEIGHTS", raising=False)
    assert "emb_dim=64" in run("02_gpt2_weights.ipynb")


@pytest.mark.slow
def test_scaling_without_a_ladder(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP", "")
    assert re.search(r"predicted [\d.]+ \+- [\d.e+-]+, measured [\d.]+: [+-]", run("03_scaling.ipynb"))


@pytest.mark.slow
def test_schedules_and_optimizers():
    assert run("04_schedules_and_optimizers.ipynb").count("lowest") == 4


@pytest.mark.parametrize("form", ["weights", "huggingface", "openai", "book"])
def test_gpt2_weights(tmp_path, monkeypatch, form):
    net = GPT(GPTConfig(context_length=64, emb_dim=64, n_heads=1, n_layers=2, qkv_bias=True, tie_weights=True))
    if form == "weights":
        save_weights(net, tmp_path / "weights.pt")
    elif form == "huggingface":
        write_huggingface(tmp_path, net.config, net.state_dict(), 50256)
    elif form == "openai":
        bundle(openai_tensors(net), tmp_path / "model.ckpt")
        write_hparams(tmp_path, net.config)
    else:
        write_book(tmp_path, net.config, net.state_dict())
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    printed = run("02_gpt2_weights.ipynb")
    assert str(net.config) in printed
    assert len(re.findall("""['"]Every effort moves you""", printed)) == 5 + 3 + 2
    assert printed.count("bit for bit the same: True") == 2
