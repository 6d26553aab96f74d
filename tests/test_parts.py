"""Parts of a text become the same shards in any order, at the same time, and however often they are killed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import story_of
from filelock import FileLock

from src.cli.overrides import CONF
from src.data.config import PrepareConfig
from src.data.manifest import COUNTS, MANIFEST, Part, read_manifest
from src.data.prepare import prepare_shards
from src.data.shards import read_shards
from src.tokenizer import gpt2_tokenizer

RUN = """
import json, sys
from src.data.config import PrepareConfig
from src.data.prepare import prepare_shards
prepare_shards(PrepareConfig(**json.loads(sys.argv[1])), chunk=20, save_every=0)
"""


def texts_in(folder: Path, files: int, documents: int = 3) -> Path:
    """A folder of JSON lines, each file with other texts."""
    folder.mkdir()
    for number in range(files):
        texts = [story_of(40 + (7 * number + other) % 90) + f" {number} {other}" for other in range(documents)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number:02d}.jsonl").write_text(lines)
    return folder


def config(source: Path, output: Path, part: str | None = None, **options) -> PrepareConfig:
    options = {"name": "s", "shard_tokens": 150, "val_tokens": 60, **options}
    return PrepareConfig(source=str(source), output=str(output), part=part, **options)


def made(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def started(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *arguments], cwd=CONF.parent, stdout=subprocess.DEVNULL)


def test_parts_in_any_order_three_of_them_killed(tmp_path):
    source, dice = texts_in(tmp_path / "texts", 37, documents=12), random.Random()
    parts, sizes = [Part(number, 16) for number in range(1, 17)], {"shard_tokens": 900}
    for part in parts:
        prepare_shards(config(source, tmp_path / "in_order", str(part), **sizes))
    order = [(part, False) for part in dice.sample(parts, 16)]
    for part in dice.sample(parts, 3):
        order.insert(dice.randrange(order.index((part, False)) + 1), (part, True))
    for part, is_killed in order:
        asked, manifest = config(source, tmp_path / "out", str(part), **sizes), tmp_path / "out" / part.manifest
        if is_killed:
            process = started("-c", RUN, json.dumps(asked.model_dump()))
            while process.poll() is None and not manifest.exists():
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert json.loads(manifest.read_bytes())["complete"] is False
        else:
            prepare_shards(asked)
        assert (tmp_path / "out" / MANIFEST).exists() == ((part, is_killed) == order[-1])
    assert made(tmp_path / "out") == made(tmp_path / "in_order")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    for part in parts:
        assert prepare_shards(config(source, tmp_path / "out", str(part), **sizes))["complete"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_together_they_hold_the_tokens_of_the_whole(tmp_path):
    source = texts_in(tmp_path / "texts", 7)
    whole = prepare_shards(config(source, tmp_path / "whole"))
    for number in 3, 1, 2:
        prepare_shards(config(source, tmp_path / "out", f"{number}/3"))
    joint = read_manifest(tmp_path / "out")
    assert joint["sources"] == whole["sources"]
    assert [joint[key] for key in COUNTS] == [whole[key] for key in COUNTS]
    names = [shard["file"] for shard in joint["shards"]]
    assert names[:2] == ["s-1-of-3_val_000000.bin", "s-1-of-3_train_000001.bin"]
    assert [name for name in names if "of-3_train_000000" in name] == [
        "s-2-of-3_train_000000.bin",
        "s-3-of-3_train_000000.bin",
    ]
    assert names[1:] == sorted(names[1:])
    read = [read_shards(str(tmp_path / folder), 0.9, gpt2_tokenizer()) for folder in ("whole", "out")]
    for split in 0, 1:
        assert np.array_equal(read[0][split][:], read[1][split][:])


def test_two_processes_at_once_and_a_sweep(tmp_path, command):
    source = texts_in(tmp_path / "texts", 5)
    given = [f"source={source}", "name=s", "shard_tokens=150", "val_tokens=60"]
    both = [f"output={tmp_path / 'both'}", *given]
    processes = [started("-m", "src.prepare", f"part={number}/2", *both) for number in (1, 2)]
    sweep = ["hydra.sweep.dir=" + str(tmp_path / "sweep"), f"output={tmp_path / 'sweep_out'}", *given]
    status, out, err = command("prepare", "-m", "part=1/2,2/2", *sweep)
    assert status == 0, err
    lines = [line for line in out.splitlines() if "shards" in line]
    assert [line.split(": ")[0].split(", ")[1] for line in lines] == ["part 1/2", "part 2/2"]
    assert [line.split(", ")[-1] for line in lines] == ["1 of 2 parts complete", "2 of 2 parts complete"]
    assert [process.wait() for process in processes] == [0, 0]
    assert made(tmp_path / "both") == made(tmp_path / "sweep_out")
    assert read_manifest(tmp_path / "both")["complete"]


def test_what_val_tokens_and_max_tokens_count(tmp_path):
    source = texts_in(tmp_path / "texts", 4)
    options = {"val_tokens": None, "max_tokens": 401, "shard_tokens": 10**6}
    first, second = (prepare_shards(config(source, tmp_path / "out", part, **options)) for part in ("1/2", "2/2"))
    assert {shard["file"]: shard["tokens"] for shard in first["shards"]} == {
        "s-1-of-2_val_000000.bin": first["tokens"] // 10,
        "s-1-of-2_train_000000.bin": first["tokens"] - first["tokens"] // 10,
    }
    assert [shard["file"] for shard in second["shards"]] == ["s-2-of-2_train_000000.bin"]
    longest = max(len(gpt2_tokenizer().encode(story_of(129) + " 9 9")), 150)
    for part in first, second:
        assert 201 <= part["tokens"] < 201 + longest


def test_a_part_without_text_has_no_shard(tmp_path):
    source = texts_in(tmp_path / "texts", 3)
    (source / "01.jsonl").write_text('{"text": null}\n')
    parts = [prepare_shards(config(source, tmp_path / "out", f"{number}/3")) for number in (1, 2, 3)]
    assert (parts[1]["shards"], parts[1]["skipped"]) == ([], 1)
    assert read_manifest(tmp_path / "out")["tokens"] == parts[0]["tokens"] + parts[2]["tokens"]


def refused(asked: PrepareConfig) -> str:
    with pytest.raises(ValueError) as error:
        prepare_shards(asked)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_part_of_one_is_the_whole(tmp_path):
    source = texts_in(tmp_path / "texts", 2)
    for part in None, "1/1":
        prepare_shards(config(source, tmp_path / str(part and "one"), part))
    assert made(tmp_path / "None") == made(tmp_path / "one")


@pytest.mark.parametrize(
    ("part", "expected"),
    [("3", "part=3 is not <number>/<parts>; use part=1/16"), ("x/2", "is not <number>/<parts>"),
     ("0/16", "part=0/16 is none of 1/16 to 16/16; use part=1/16"), ("17/16", "is none of"), ("0/0", "use part=1/1")],
)  # fmt: skip
def test_what_is_no_part(part, expected):
    with pytest.raises(ValueError) as error:
        PrepareConfig(source="x", part=part)
    assert expected in str(error.value)


def test_parts_of_another_set_are_refused(tmp_path):
    source, output = texts_in(tmp_path / "texts", 5), tmp_path / "out"
    assert refused(config(source, output, "7/16")).endswith("than source has files, 5; use part=5/5")
    assert not output.exists()
    prepare_shards(config(source, output, "1/3"))
    before = made(output)
    for part in "2/3", "1/3":
        assert "use text_key=text, or output=<a new folder>" in refused(config(source, output, part, text_key="other"))
        assert "use shard_tokens=150, or" in refused(config(source, output, part, shard_tokens=99))
        assert "val_tokens=null is not what" in refused(config(source, output, part, val_tokens=None))
        assert "with another tokenizer" in refused(config(source, output, part, tokenizer={"name": "byte"}))
    assert "part=<number>/4 is not what" in refused(config(source, output, "2/4"))
    assert "use part=<number>/3, or output=" in refused(config(source, output))
    (source / "00a.jsonl").write_text('{"text": "more"}\n')
    assert "with other sources" in refused(config(source, output, "2/3"))
    (source / "00a.jsonl").unlink()
    assert made(output) == before
    prepare_shards(config(source, tmp_path / "whole"))
    assert "holds something else (manifest.json" in refused(config(source, tmp_path / "whole", "1/3"))
    with FileLock(output / ".lock-2-of-3"):
        assert refused(config(source, output, "2/3")).startswith(f"part=2/3 of output={output} is in use by another")
        assert prepare_shards(config(source, output, "3/3"))["complete"]


def test_a_part_whose_text_has_changed_can_be_made_again(tmp_path):
    source, output = texts_in(tmp_path / "texts", 2), tmp_path / "out"
    for part in "1/2", "2/2":
        prepare_shards(config(source, output, part))
    with (source / "01.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert prepare_shards(config(source, output, "1/2"))["complete"]
    remedy = refused(config(source, output, "2/2")).split("; use ")[1]
    assert remedy.startswith(f"rm {output}/manifest-2-of-2.json and repeat the command")
    (output / "manifest-2-of-2.json").unlink()
    prepare_shards(config(source, output, "2/2"))
    for part in "1/2", "2/2":
        prepare_shards(config(source, tmp_path / "new", part))
    assert made(output) == made(tmp_path / "new")


def test_training_on_an_unfinished_set_names_the_missing_parts(tmp_path):
    source, output = texts_in(tmp_path / "texts", 4), tmp_path / "out"
    for part in "1/4", "3/4":
        prepare_shards(config(source, output, part))

    def reading(path) -> str:
        with pytest.raises(ValueError) as error:
            read_shards(str(path), 0.9, gpt2_tokenizer())
        return str(error.value)

    expected = f"{output} lack parts; use python -m src.prepare -m part=2/4,4/4 output={output} ..."
    assert expected in reading(output)
    assert expected in reading(output / "*train*.bin")
    for part in "2/4", "4/4":
        prepare_shards(config(source, output, part))
    (output / MANIFEST).unlink()  # as if the last was killed before it wrote this
    assert "-m part=4/4 output=" in reading(output)
    prepare_shards(config(source, output, "4/4"))
    assert len(read_shards(str(output), 0.9, gpt2_tokenizer())[1]) == 60
