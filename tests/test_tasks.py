"""``tasks=``: lm-eval's figures for our model are those of a plain computation over each example."""

import json
import math
import re
import sys

import pytest
import torch
import yaml

from src.cli.overrides import compose
from src.evaluate import check, evaluate
from src.evaluation.harness import HarnessLM
from src.evaluation.tasks import find_names, load_tasks
from src.generation.decode import generate
from src.model.gpt import GPT
from src.tokenizer import encode, gpt2_tokenizer, text_to_token_ids

LONG = "a" + " a" * 60  # more than the 32 tokens of context
END = 50256


def log_probability(net: GPT, context: str, continuation: str) -> tuple[float, bool]:
    """Of ``continuation``, one row at a time, and whether each of its tokens is the likeliest."""
    before = encode(context).tolist() if context else [END]
    whole = encode(context + continuation).tolist() if context else [END, *encode(continuation).tolist()]
    count = len(whole) - len(before)
    tokens = torch.tensor(whole[-33:])[None]
    with torch.no_grad():
        steps = net(tokens[:, :-1])[0, -count:].log_softmax(-1)
    targets = tokens[0, -count:]
    return steps.gather(-1, targets[:, None]).sum().item(), bool((steps.argmax(-1) == targets).all())


def greedy(net: GPT, context: str, count: int) -> str:
    """The next tokens after ``context``, one text at a time."""
    tokens = text_to_token_ids(context) if context else torch.tensor([[END]])
    return gpt2_tokenizer().decode(generate(net, tokens, count)[0, tokens.shape[1] :].tolist())


def requests(*arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, one, number) for number, one in enumerate(arguments)]


@pytest.fixture
def adapter(small_net):
    return HarnessLM(small_net, gpt2_tokenizer(), batch_size=3)


def test_likelihoods_of_continuations(adapter, small_net):
    pairs = [
        ("The river did not", " say"),
        ("", "So"),
        (LONG, " long one ends here"),
        ("It was", " for you all the same"),
    ]
    pairs.append(("It was", greedy(small_net, "It was", 2)))
    found = adapter.loglikelihood(requests(*pairs))
    for pair, (likely, is_greedy) in zip(pairs, found, strict=True):
        expected = log_probability(small_net, *pair)
        assert likely == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]
    assert found[-1][1]
    assert adapter.loglikelihood(requests(("It was ", "for"))) == adapter.loglikelihood(requests(("It was", " for")))
    with pytest.raises(ValueError, match=r"context_length=32 cannot hold a continuation of 33 tokens.*use weights="):
        adapter.loglikelihood(requests(("a", " b" * 33)))


def test_likelihoods_of_whole_texts_longer_than_the_context(adapter, small_net):
    texts = ["So it was.", " b c" * 40, ""]
    found = adapter.loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, total in zip(texts, found, strict=True):
        tokens = [END, *encode(text).tolist()]
        expected, done = 0.0, 1
        while done < len(tokens):  # the last window reaches back as far as the model can see
            last = min(max(done, 1) + 32, len(tokens))
            window = torch.tensor(tokens[max(last - 33, 0) : last])[None]
            with torch.no_grad():
                steps = small_net(window[:, :-1])[0].log_softmax(-1)
            scores = steps.gather(-1, window[0, 1:, None]).squeeze(-1)
            expected += scores[len(scores) - (last - done) :].sum().item()
            done = last
        assert total == pytest.approx(expected, abs=2e-3)


def test_texts_up_to_a_stop_string(adapter, small_net):
    contexts = ["The ferry", "It was a brown river and", ""]
    whole = [greedy(small_net, context, 6) for context in contexts]
    options = {"until": ["\n\n\n"], "max_gen_toks": 6}
    assert adapter.generate_until(requests(*((context, options) for context in contexts))) == whole
    stop = whole[0][3:5]
    cut = adapter.generate_until(requests(("The ferry", options), ("The ferry", {**options, "until": [stop]})))
    assert cut == [whole[0], whole[0][: whole[0].index(stop)]]
    tokens = torch.from_numpy(encode(LONG)[-26:].astype("int64"))[None]  # leaves room for six
    expected = gpt2_tokenizer().decode(generate(small_net, tokens, 6)[0, 26:].tolist())
    assert adapter.generate_until(requests((LONG, options))) == [expected]
    assert len(adapter.generate_until(requests((LONG, {"max_gen_toks": 40})))) == 1  # more than the context can hold


def test_sampled_texts_do_not_depend_on_the_batch(small_net):
    options = {"do_sample": True, "temperature": 0.8, "max_gen_toks": 5}
    asked = requests(*((context, options) for context in ("The ferry", "It", "The ferry", "a brown river")))
    found = [HarnessLM(small_net, gpt2_tokenizer(), size, seed=7).generate_until(asked) for size in (1, 3)]
    assert found[0] == found[1]
    assert found[0][0] != found[0][2]
    assert HarnessLM(small_net, gpt2_tokenizer(), 3, seed=8).generate_until(asked) != found[0]


QUESTIONS = [
    {"ctx": "A ferry crosses. The woman", "endings": ["pulls.", "sings a long song about the river and rain", "is"]},
    {"ctx": "So", "endings": ["it was not for you", "was", "said nobody"]},
]
PASSAGES = ["It was never so", "The river did not say", "Nobody waited on the far side"]
STYLES = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "endings",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def task_files(tmp_path):
    """``task_files(name, style, rows)`` writes a task file and its data, and returns their folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name: str, style: str, rows: list[dict], **changed):
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **STYLES[style], **changed}))
        return folder

    return write


def test_figures_of_tasks(command, small_net, small_weights, text, task_files, tmp_path):
    scores = [[log_probability(small_net, one["ctx"], f" {e}")[0] for e in one["endings"]] for one in QUESTIONS]
    best = [row.index(max(row)) for row in scores]
    lengths = [[len(ending) for ending in one["endings"]] for one in QUESTIONS]
    normalized = [[s / n for s, n in zip(*pair, strict=True)] for pair in zip(scores, lengths, strict=True)]
    best_normalized = [row.index(max(row)) for row in normalized]
    assert best != best_normalized
    labels = [best[0], (best[1] + 1) % 3]
    task_files("ferry", "choices", [{**one, "label": n} for one, n in zip(QUESTIONS, labels, strict=True)])
    likely = [c + greedy(small_net, c, 1) for c in (f"It was {n} and" for n in range(200))]
    passages = [*PASSAGES, next(text for text in likely if re.fullmatch(r"It was \d+ and [a-zA-Z]+", text))]
    task_files("last_words", "words", [{"text": passage} for passage in passages])
    task_files("whole", "texts", [{"text": passage} for passage in PASSAGES])
    answers = [greedy(small_net, "The ferry", 3), "never"]
    folder = task_files("asked", "answers", [{"text": "The ferry", "answer": answer} for answer in answers])

    status, out, err = command(
        "evaluate", f"weights={small_weights}", f"data.path={text}", f"tasks_path={folder}",
        "tasks=[ferry,last_words,whole,asked]", f"hydra.run.dir={tmp_path / 'out'}", "surprises=0",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["ferry_examples"] == 2
    assert found["ferry_acc"] == 0.5
    assert found["ferry_acc_norm"] == sum(a == b for a, b in zip(best_normalized, labels, strict=True)) / 2
    assert found["ferry_acc_stderr"] == pytest.approx(math.sqrt(0.25 / (2 - 1)))
    words = [log_probability(small_net, *_cut(passage)) for passage in passages]
    assert found["last_words_acc"] == sum(is_greedy for _, is_greedy in words) / 4 > 0
    assert found["last_words_perplexity"] == pytest.approx(math.exp(-sum(one for one, _ in words) / 4), rel=1e-4)
    total = sum(log_probability(small_net, "", passage)[0] for passage in PASSAGES)
    size = sum(len(passage) for passage in PASSAGES)
    assert found["whole_byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert found["asked_exact_match"] == 0.5
    for line in "ferry acc", "ferry acc norm", "last words perplexity", "whole byte perplexity", "unigram loss":
        assert f"\n{line}  " in out

    cfg = compose("evaluate", [f"weights={small_weights}", f"data.path={text}", f"tasks_path={folder}",
                               "tasks=[last_words]", "tasks_limit=2", "data.batch_size=1"])  # fmt: skip
    few = evaluate(cfg, tmp_path)
    assert few["last_words_examples"] == 2
    assert few["last_words_perplexity"] == pytest.approx(math.exp(-sum(one for one, _ in words[:2]) / 2), rel=1e-4)
    assert "ferry_acc" not in few


def _cut(passage: str) -> tuple[str, str]:
    context, _, word = passage.rpartition(" ")
    return context, f" {word}"


def test_without_lm_eval(command, small_weights, text, tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name in ("src.evaluation.harness", "src.evaluation.tasks")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    common = (f"weights={small_weights}", f"data.path={text}", "surprises=0", f"hydra.run.dir={tmp_path / 'out'}")
    status, _, err = command("evaluate", *common, "tasks=[hellaswag]")
    assert (status, err) == (1, 'error: tasks=[hellaswag] needs lm-eval; pip install -e ".[tasks]"\n')
    assert not (tmp_path / "out").exists()
    status, _, err = command("evaluate", *common)
    assert status == 0, err


def test_names_of_tasks():
    known = ["arc_easy", "hellaswag", "mmlu_law", "mmlu_logic"]
    assert find_names(["mmlu_*", "hellaswag", "mmlu_law"], known) == ["mmlu_law", "mmlu_logic", "hellaswag"]
    with pytest.raises(ValueError, match=r"^tasks=\[helaswag\] is not a task of lm-eval; use 'tasks=\[hellaswag\]'$"):
        find_names(["helaswag"], known)
    with pytest.raises(ValueError, match=r"\ntasks=\[hela\*\] is not"):
        find_names(["arc_esy", "hela*"], known)


def test_tasks_that_cannot_be_loaded_are_one_line(task_files, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = [{"text": PASSAGES[0]}]
    task_files("far", "words", rows, dataset_path="nobody/nowhere", dataset_kwargs={})
    task_files("wrong", "words", rows, output_type="sung")
    folder = str(task_files("gone", "words", rows, dataset_kwargs={"data_files": {"test": "/nowhere.json"}}))
    for name, reason in {"far": "the data cannot be downloaded", "gone": "nowhere.json", "wrong": "Error"}.items():
        with pytest.raises(ValueError, match=rf"^tasks=\[{name}\].*{reason}.*; [^;]*$"):
            load_tasks([name], folder)


@pytest.mark.slow  # reads all of lm-eval's task files
def test_lm_evals_own_tasks(task_files):
    folder = str(task_files("mine", "words", [{"text": PASSAGES[0]}]))
    with pytest.raises(ValueError, match=r"^tasks=\[lambada_openia\] is not .* use 'tasks=\[lambada_openai\]'$"):
        load_tasks(["mine", "lambada_openia"], folder)


def test_checked_before_anything_runs(small_weights, text):
    cfg = compose("evaluate", [f"weights={small_weights}", f"data.path={text}", "tasks=[hellaswag]", "+note=mine"])
    config = check(cfg)
    assert config.tasks == ("hellaswag",)
    assert config.note == "mine"
