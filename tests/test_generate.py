"""``python -m src.generate``: any text in, the text alone out."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time

import pytest
import torch

from src import generate
from src.cli import overrides as cli
from src.generation.config import GenerationConfig
from src.generation.text import continue_texts
from src.interop.weights import save_weights
from src.model.gpt import GPT

NASTY = [
    "She said \"no\", and 'yes'",
    "a,b,c",
    "x=1",
    "weights=nowhere",
    "[1, 2, 3]",
    "{a: b}",
    "(maybe)",
    "${oc.env:HOME}",
    "???",
    "null",
    "a\nb\n\nc",
    "\ttabs\r\n",
    "back\\slash \\' \\\" \\",
    "Жук и ёж",
    "\U0001f469\u200d\U0001f680 to the moon",
    "e\u0301 \u202e right to left",
    "~key +key @key $HOME `ls` #",
    "-m --help",
    " spaces ",
    "%s %(x)s {0}",
    "",
    "!",
]


@pytest.mark.parametrize("way", ["prompt", "prompt_file"])
def test_nasty_prompts_arrive_unchanged(command, monkeypatch, small_weights, tmp_path, way):
    arrived = []

    def record(net, prompts, *args, **kwargs):
        arrived.extend(prompts)
        return continue_texts(net, prompts, *args, **kwargs)

    monkeypatch.setattr("src.generation.text.continue_texts", record)
    given = []
    for number, text in enumerate(NASTY):
        file = tmp_path / f"{number}, a=[b].txt"
        file.write_bytes(text.encode())
        given.append(f"prompt={text}" if way == "prompt" else f"prompt_file={file}")
    status, out, err = command("generate", f"weights={small_weights}", "max_new_tokens=1", "temperature=0", *given)
    assert status == 0, err
    assert arrived == NASTY
    at = 0
    for text in NASTY:  # each echoed, in their order
        at = out.index(text, at) + len(text)


@pytest.mark.parametrize("text", NASTY[:4])
def test_a_single_nasty_prompt(command, small_weights, small_net, text):
    status, out, err = command("generate", f"weights={small_weights}", "max_new_tokens=4", f"prompt={text}", "top_k=7")
    config = GenerationConfig(top_k=7, max_new_tokens=4)
    ((expected,),) = continue_texts(small_net, [text], config)
    assert (status, out, err) == (0, f"{text}{expected.text}\n", "")


def test_stdin_is_a_prompt_like_any_other(small_weights, small_net, tmp_path):
    """In a process of its own, as everything with a pipe: the text alone on stdout, nothing left in the folder."""
    text = "Жук, \U0001f680\r\nand\n"
    done = subprocess.run(
        [sys.executable, "-m", "src.generate", f"weights={small_weights}", "prompt=-", "max_new_tokens=5"],
        input=text.encode(), capture_output=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": str(cli.CONF.parent), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    ((expected,),) = continue_texts(small_net, [text], GenerationConfig(max_new_tokens=5))
    assert done.stdout.decode() == text + expected.text + "\n"
    assert done.stderr == b""
    assert list(tmp_path.iterdir()) == []


def terminal(tmp_path, *arguments: str, typed: bytes = b"") -> list[bytes]:
    """What arrives, read by read, on a terminal that runs the command."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "src.generate", *arguments], stdin=follower, stdout=follower, stderr=follower,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(cli.CONF.parent)},
    )  # fmt: skip
    os.close(follower)
    os.write(leader, typed)
    pieces = []
    try:
        while piece := os.read(leader, 4096):
            pieces.append(piece)
            time.sleep(0.005)
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=60) == 0, b"".join(pieces)
    return pieces


def test_a_terminal_is_asked_until_it_has_no_more(small_weights, tmp_path):
    pieces = terminal(
        tmp_path, f"weights={small_weights}", "max_new_tokens=30", typed=b'Every effort\nSo, "what"\n\x04'
    )
    said = b"".join(pieces)
    assert said.count(b"> ") == 3
    assert said.count(b"Every effort") == 2  # typed, and continued
    assert len(pieces) > 10  # as it came
    for piece in pieces:
        piece.decode()  # no half characters


def test_several_samples_of_several_prompts(command, small_weights):
    arguments = (f"weights={small_weights}", "prompt=So", "prompt=And", "num_samples=2", "max_new_tokens=6")
    status, out, err = command("generate", *arguments, "seed=123")
    assert status == 0
    assert err.splitlines() == [f"-- prompt {p}, text {s}" for p in (1, 2) for s in (1, 2)]
    lines = out.splitlines()
    assert len({*lines}) == 4
    assert command("generate", *arguments, "seed=123")[1] == out
    assert command("generate", *arguments, "seed=2")[1] != out
    without = command("generate", *arguments, "seed=123", "echo=false")[1].splitlines()
    assert [line.removeprefix("So").removeprefix("And") for line in lines] == without


def test_presets(command, small_weights, small_net):
    found = {}
    for preset in "greedy", "sample", "nucleus", "beam":
        status, found[preset], err = command(
            "generate", f"weights={small_weights}", f"generation={preset}", "prompt=So", "max_new_tokens=6"
        )
        assert status == 0
        assert ("score" in err) == (preset == "beam")
    configs = {
        "sample": {},
        "greedy": {"temperature": 0},
        "nucleus": {"top_k": None, "top_p": 0.9},
        "beam": {"temperature": 0, "num_beams": 4},
    }
    for preset, config in configs.items():
        ((expected,),) = continue_texts(small_net, ["So"], GenerationConfig(max_new_tokens=6, **config))
        assert found[preset] == f"So{expected.text}\n"
    assert len(set(found.values())) >= 3


def test_stop(command, small_weights):
    arguments = (f"weights={small_weights}", "generation=greedy", "prompt=So", "max_new_tokens=12")
    whole = command("generate", *arguments)[1]
    stop = whole[20:24]
    assert command("generate", *arguments, "stop=, = [", f"stop={stop}")[1] == whole[: whole.index(stop, 2)] + "\n"


def test_inspection(command, small_weights):
    status, out, err = command(
        "generate",
        f"weights={small_weights}",
        "prompt=So",
        "max_new_tokens=3",
        "inspect=true",
        "temperature=2",
        "seed=3",
    )
    assert status == 0
    assert out.startswith("So")
    lines = err.splitlines()
    assert len(lines) == 3 * 11
    for step in range(3):
        shares = [float(line[2:].split("%")[0]) for line in lines[11 * step + 1 : 11 * step + 11]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 100


def test_inspection_is_of_the_weights_own_tokens(command, tiny_run, tmp_path):
    (tmp_path / "few.txt").write_text("abba " * 40)
    run = tiny_run("tokenizer=char", f"data.path={tmp_path / 'few.txt'}", "callbacks=none", "trainer.max_steps=1")
    status, _, err = command("generate", f"weights={run.folder}", "prompt=ab", "max_new_tokens=1", "inspect=true")
    assert status == 0, err
    assert {line.split("  ")[-1] for line in err.splitlines()[1:]} >= {"'a'", "'b'", "' '"}


def test_whoever_reads_the_texts_may_leave(small_weights, tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m src.generate weights={small_weights} prompt=So max_new_tokens=100000 "
        "| head -c 5",
        shell=True, capture_output=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": str(cli.CONF.parent)},
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr


BAD = {
    "weights=W prompt=So precision=fp8": "precision=32-true",
    "prompt=So": "weights is needed",
    "weights=nowhere prompt=So": "none of gpt2, gpt2-medium",
    "weights=W": "prompt is needed",
    "weights=null prompt=So": "weights=null should be a valid string; use weights=gpt2",
    "weights=[a] prompt=So": "should be a valid string; use weights=gpt2",
    "weights='' prompt=So": "weights is empty",
    "weights='~nosuch/x' prompt=So": "none of gpt2",
    "weights=ü.pt prompt=So": "\"weights='ü.pt'\"",
    "weights=W prompt=So seed=99999999999999999999": "seed=123",
    "weights=W prompt=So generation=beam length_penalty=100": "length_penalty=1.0",
    "weights=W prompt=So repetition_penalty=1e-40": "repetition_penalty=1.0",
    "weights=W prompt=So hydra.run.dir=src": "hydra.run.dir=<a new folder>",
    "weights=W prompt=So temperature=-1": "temperature=1.0",
    "weights=W prompt=So temperature=hot": "should be a valid number",
    "weights=W prompt=So top_k=-3": "top_k=25",
    "weights=W prompt=So top_p=1.5": "top_p=0.9",
    "weights=W prompt=So max_new_tokens=0": "max_new_tokens=50",
    "weights=W prompt=So num_beams=3": "generation=beam",
    "weights=W prompt=So generation=beam num_samples=9": "num_beams=9",
    "weights=W prompt=So generation=beem": "generation=beam",
    "weights=W prompt=So inspect=true num_samples=2": "num_samples=1",
    "weights=W prompt=So prompt=No inspect=true": "use one prompt=",
    "weights=W prompt_file=nowhere.txt": "prompt_file=nowhere.txt cannot be read",
    "weights=W prompt_file=W": "is not UTF-8",
    "weights=W prompt_file=/dev/zero": "prompt_file=/dev/zero has more than 17 MB; use prompt_file=",
    "weights=W prompt=So num_samples=1000000": "must be at most 10,000; use num_samples=1",
    "weights=W prompt=So generation=beam num_beams=60000": "must be at most 256; use num_beams=1",
    "weights=W prompt=So device=quantum": "device=auto",
    "weights=W prompt=So top-k=3": "top_k",
    "weights=W prompt=So max_tokens=3": "max_new_tokens",
}


def test_a_failed_job_fails_the_sweep(command, small_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for sweep in f"weights={small_weights},nowhere.pt", "temperature=abc,1":
        more = [] if "weights" in sweep else [f"weights={small_weights}"]
        status, out, err = command("generate", "-m", sweep, *more, "prompt=So", "max_new_tokens=2")
        assert status == 1
        assert out.startswith("So")  # the other job ran
        assert "error: " in err
        assert "Traceback" not in err
    status, out, _ = command("generate", "-m", "top_k=1,2", f"weights={small_weights}", "prompt=So", "max_new_tokens=2")
    assert (status, out.count("So")) == (0, 2)


def test_what_comes_through_a_pipe_comes_once(command, small_weights, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("Every effort",))
    writer.start()
    status, out, _ = command("generate", f"weights={small_weights}", f"prompt_file={pipe}", "max_new_tokens=2")
    writer.join()
    assert status == 0
    assert out.startswith("Every effort")


def test_a_closed_stdout(small_weights, tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m src.generate weights={small_weights} prompt=So max_new_tokens=2 >&- <&-",
        shell=True, capture_output=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": str(cli.CONF.parent)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", BAD)
def test_mistakes_are_one_line_with_their_cure(command, small_weights, arguments, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(cli.CONF.parent)
    status, out, err = command("generate", *arguments.replace("W", str(small_weights)).split())
    assert (status, out) == (1, "")
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert BAD[arguments] in err


def test_a_broken_model_is_one_line(command, small_weights, tmp_path):
    damaged = bytearray(small_weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(damaged)
    status, out, err = command("generate", f"weights={tmp_path / 'damaged.pt'}", "prompt=So")
    assert (status, out) == (1, "")
    assert err.startswith("error: weights=")
    assert "does not match its SHA-256" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("way", ["temperature=0", "temperature=1", "generation=beam", "num_samples=2", "inspect=true"])
def test_weights_that_make_no_numbers_make_no_text(command, small_net, tmp_path, way):
    """Finite each, their products are not."""
    net = GPT(small_net.config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1e38)
    save_weights(net, tmp_path / "huge.pt")
    status, out, err = command("generate", f"weights={tmp_path / 'huge.pt'}", "prompt=So", way)
    assert (status, out) == (1, "")
    assert err == "error: the model's logits are not finite, no token can be chosen; use weights=<other weights>\n"


def test_a_text_that_breaks_off_ends_its_line(command, small_net, tmp_path):
    net = GPT(small_net.config)
    net.load_state_dict(small_net.state_dict())
    with torch.no_grad():
        net.pos_emb.weight[3] = 3e38
    save_weights(net, tmp_path / "huge.pt")
    status, out, err = command("generate", f"weights={tmp_path / 'huge.pt'}", "prompt=So", "max_new_tokens=9")
    assert status == 1
    assert out.startswith("So")
    assert out.endswith("\n")
    assert err.startswith("error: the model's logits are not finite")


def test_too_little_memory_is_one_line(command, small_weights, monkeypatch):
    def search(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("src.generation.text.beam_search", search)
    status, out, err = command("generate", f"weights={small_weights}", "prompt=So", "generation=beam")
    assert (status, out, err) == (1, "", "error: out of memory; use num_beams=2\n")


def test_a_prompt_through_a_pipe_is_bounded(small_weights, tmp_path):
    done = subprocess.run(
        f"yes | {sys.executable} -m src.generate weights={small_weights} prompt=-",
        shell=True, capture_output=True, cwd=tmp_path, timeout=120, text=True,
        env={**os.environ, "PYTHONPATH": str(cli.CONF.parent)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: prompt=- has more than 17 MB; use prompt=<the end of it, which counts>\n"


def test_nothing_heavy_before_the_overrides_are_checked(small_weights):
    code = (
        "import sys\nfrom src import generate\nfrom src.cli import overrides\n"
        "print(overrides.find_problems('generate', ['weights=nowhere'], generate.check))\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'huggingface_hub', 'tiktoken'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cli.CONF.parent, capture_output=True, text=True, timeout=60)
    assert "nowhere" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_lightning_is_not_needed(small_weights):
    code = (
        "import sys\nfrom src.interop.weights import load_weights\nimport src.generation.text\n"
        "load_weights(sys.argv[1])\n"
        "print(sorted({'lightning', 'hydra', 'omegaconf', 'transformers', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_weights)],
        cwd=cli.CONF.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_defaults_of_the_library_are_those_of_the_command():
    cfg, config = cli.compose("generate", ["weights=x"]), generate.GenerateConfig()
    assert config.model_dump() == {key: cfg[key] for key, _ in config} | {"weights": "gpt2"}
    assert GenerationConfig().model_dump() == {key: cfg[key] for key in GenerationConfig.model_fields}


def test_config_is_checked_by_every_key():
    assert set(generate.GenerateConfig.model_fields) == set(cli.compose("generate", ["weights=x"]))


def test_bfloat16_continues_much_like_float32(command, small_weights):
    given = ("generate", f"weights={small_weights}", "prompt=So", "temperature=0", "max_new_tokens=3", "echo=false")
    texts = [command(*given, f"precision={precision}") for precision in ("32-true", "bf16-true")]
    assert [status for status, _, _ in texts] == [0, 0]
    assert texts[0][1] == texts[1][1]  # its next tokens are no toss-up


def test_a_literal_end_of_text_means_what_it_meant_in_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "a" / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "outputs" / "a" / "b" / "checkpoints" / "last.ckpt").touch()
    for spelling, brought in ("text", ["special_tokens=text"]), ("parse", []), ("$(reboot)", []):
        record = {"status": "completed", "config": {"data": {"special_tokens": spelling}}}
        (tmp_path / "outputs" / "a" / "b" / "run.json").write_text(json.dumps(record))
        for weights in "outputs/a/b", "'outputs/a/b/checkpoints/last.ckpt'":
            given = [f"weights={weights}", "seed=123"]
            assert generate.with_special_tokens_of_run(given) == [*given, *brought]
            given = [f"weights={weights}", "special_tokens=parse"]
            assert generate.with_special_tokens_of_run(given) == given
    assert generate.with_special_tokens_of_run(["weights=gpt2"]) == ["weights=gpt2"]
