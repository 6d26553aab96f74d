"""``callbacks.tasks``: while a model learns, its scores are those that ``src.evaluate`` gives its checkpoint."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import column, metrics_of, story_of
from interrupting import first_difference
from test_distributed import SAME, losses
from test_tasks import PASSAGES, task_files  # noqa: F401

from src import evaluate
from src.checkpoint.interruption import Interrupted
from src.cli import overrides as cli
from src.evaluation.harness import HarnessLM

COMMON = ("trainer.max_epochs=1", "data.batch_size=4", "eval.every_steps=4", "~callbacks.loss_plot",
          "callbacks.text_samples.max_new_tokens=2", "optimizer.learning_rate=3e-3")  # fmt: skip


@pytest.fixture
def scored(task_files, tmp_path):  # noqa: F811
    """Overrides for a likelihood task, a task with generated answers, and another text."""
    task_files("words", "words", [{"text": passage} for passage in PASSAGES])
    folder = task_files("asked", "answers", [{"text": "The ferry", "answer": answer} for answer in ("a", "b")])
    code = tmp_path / "code.txt"
    code.write_text(f"def f(x): return {story_of(50)}")
    return ("callbacks.tasks.names=[words,asked]", f"callbacks.tasks.folder={folder}", "callbacks.tasks.limit=2",
            f"callbacks.tasks.texts={{code: {code}}}")  # fmt: skip


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_scores_are_those_of_evaluate(tiny_run, scored, tmp_path, caplog, averaged, precision):
    caplog.set_level("INFO")
    ema = ("callbacks=ema", "callbacks.ema.decay=0.5") if averaged else ()
    run = tiny_run(*ema, *COMMON, *scored, f"trainer.precision={precision}")
    rows = [row for row in metrics_of(run) if "val/loss" in row]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    path = run.folder / "checkpoints" / "last.ckpt"
    common = [f"weights={path}", "surprises=0", "data.batch_size=4"]
    folder, code = (one.split("=", 1)[1].removeprefix("{code: ").removesuffix("}") for one in scored[1::2])
    cfg = cli.compose("evaluate", [*common, f"data.path={code}", "split=all", "tasks=[words,asked]",
                                   f"tasks_path={folder}", "tasks_limit=2"])  # fmt: skip
    expected = evaluate.evaluate(cfg, tmp_path)
    assert rows[-1]["texts/code_loss"] == expected["loss"]
    names = {name.removeprefix("tasks/") for name in rows[-1] if name.startswith("tasks/")}
    assert {"words_perplexity", "words_acc", "asked_exact_match"} <= names
    assert [rows[-1][f"tasks/{name}"] for name in sorted(names)] == [expected[name] for name in sorted(names)]
    assert "tasks/words_examples 2" in caplog.text
    assert f"texts/code_tokens {expected['tokens']}" in caplog.text
    assert rows[0]["texts/code_loss"] > rows[-1]["texts/code_loss"]


def test_training_is_what_it_was(tiny_run, scored, monkeypatch):
    def drawing(self, *args, **kwargs):
        torch.rand(3)
        return evaluate_all(self, *args, **kwargs)

    evaluate_all = HarnessLM.loglikelihood
    monkeypatch.setattr(HarnessLM, "loglikelihood", drawing)
    one, other = tiny_run(*COMMON, *scored), tiny_run(*COMMON)
    rows = [{key: value for key, value in row.items() if not key.startswith(("tasks/", "texts/", "perf/"))}
            for row in metrics_of(one)]  # fmt: skip
    assert rows == [{key: value for key, value in row.items() if not key.startswith("perf/")}
                    for row in metrics_of(other)]  # fmt: skip
    assert rows != metrics_of(one)
    for key, weight in one.module.state_dict().items():
        assert weight.equal(other.module.state_dict()[key])
    assert (one.folder / "samples.md").read_text() == (other.folder / "samples.md").read_text()
    assert one.module.training == other.module.training


def test_a_resumed_run_logs_the_same(tiny_run, scored, at_batch, tmp_path):
    common = (*COMMON, *scored, "eval.every_steps=2", "callbacks.tasks.every_steps=5")
    whole = tiny_run(*common)
    steps = [row["step"] for row in metrics_of(whole) if "texts/code_loss" in row]
    assert steps == [0, 6, 12]
    for batch in 6, 9:
        at_batch(batch, lambda module: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            tiny_run(*common, folder=tmp_path / f"cut{batch}")
        tiny_run(*common, resume=tmp_path / f"cut{batch}")
        assert first_difference(whole.folder, tmp_path / f"cut{batch}") is None


def test_the_last_step_is_always_scored(tiny_run, scored):
    run = tiny_run(*COMMON, scored[3], "callbacks.tasks.every_steps=100")
    assert [row["step"] for row in metrics_of(run) if "texts/code_loss" in row] == [0, 12]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["callbacks.tasks.names=[wrods]"],
            r"callbacks\.tasks\.names=\[wrods\] is not a task .* use 'callbacks\.tasks",
        ),
        (
            ["callbacks.tasks.folder=nowhere"],
            r"callbacks\.tasks\.folder=nowhere is not a folder .* use callbacks\.tasks",
        ),
        (
            ["callbacks.tasks.texts={code: gone.txt}"],
            r"tasks\.texts\.code=gone\.txt does not exist .*; use '.*texts={code: <a text file>}'",
        ),
        (["callbacks.tasks.limit=0"], r"callbacks\.tasks\.limit=0 must be at least 1; use callbacks\.tasks\.limit=100"),
        (["callbacks.tasks.every_steps=0"], r"callbacks\.tasks\.every_steps=0 must be at least 1"),
    ],
)
def test_what_is_missing_is_found_before_training(tiny_run, scored, tmp_path, overrides, message, monkeypatch):
    monkeypatch.setattr("src.data.datamodule.read_split", None)  # the text is not read before
    task = scored[:2] if "names" in overrides[0] else ()
    with pytest.raises(Exception, match=message):
        tiny_run(*task, *overrides)


def test_without_lm_eval(tiny_run, scored, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(Exception, match=r"callbacks\.tasks\.names=\[words,asked\] needs lm-eval; pip install -e"):
        tiny_run(*scored)
    run = tiny_run(*COMMON, scored[3], "trainer.max_steps=2")
    assert len(column(run, "texts/code_loss")) == 2


def test_costs_nothing_when_off(tmp_path, long_text):
    arguments = ["train", "model=gpt2_tiny", f"data.path={long_text}", "trainer.max_steps=1", "trainer.accelerator=cpu"]
    code = (
        f"import sys, runpy; sys.argv = {arguments!r}\n"
        "runpy.run_module('src.train', run_name='__main__')\n"
        "print(sorted({'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(cli.CONF.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_score_what_one_does(ranks, tmp_path, tiny_run, scored, trainer):
    """Also where the model is sharded and one of them gets all of it."""
    common = (*SAME, *scored, "trainer.max_steps=5")
    whole = tiny_run(*common, "data.batch_size=4")
    two = ranks(*common, "data.batch_size=2", f"trainer={trainer}", f"hydra.run.dir={tmp_path / 'two'}")
    _, err = two.communicate()
    assert two.returncode == 0, err
    for name in "texts/code_loss", "tasks/words_perplexity":
        assert losses(tmp_path / "two", name) == pytest.approx(column(whole, name), rel=1e-4)
        assert len(column(whole, name)) == 3
