"""Every YAML composes and builds; every mistake on the command line is told in one line with its cure."""

import inspect
import itertools
import os
import shutil
import subprocess
import sys

import lightning.pytorch as L
import pytest
from hydra.utils import instantiate

from src import benchmark, compare, evaluate, export, generate, prepare
from src.cli import overrides as cli
from src.config import nearest
from src.train import check
from src.training.config import TrainerConfig
from src.training.sharded import FullyShardedStrategy

FILES = sorted(str(file.relative_to(cli.CONF).with_suffix("")) for file in cli.CONF.rglob("*.yaml"))


OTHERS = {
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "prepare": prepare,
    "benchmark": benchmark,
    "compare": compare,
}


@pytest.mark.parametrize("file", FILES)
def test_every_yaml_composes_and_builds(file, tmp_path, small_weights):
    group, _, name = file.rpartition("/")
    overrides = [f"{group}={name}"] if group else []
    command = "generate" if group == "generation" else file
    if command in OTHERS:
        (tmp_path / "a.txt").write_text("text")
        (tmp_path / "run.json").write_text("{}")
        needs = {"prepare": f"source={tmp_path}", "benchmark": "rounds=2", "compare": f"runs=[{tmp_path}]"}
        overrides.append(needs.get(command, f"weights={small_weights}"))
        overrides += [f"output={tmp_path / 'out'}"] if command in ("export", "prepare") else []
        overrides += ["data=story"] if command == "evaluate" else []
        raw = ({"prompt": ["So"], "prompt_file": [], "stop": []},) if command == "generate" else ()
        OTHERS[command].check(cli.compose(command, overrides), *raw)
        return
    needs_path = "data/text", "experiment/optimizers", "experiment/tiny_char", "experiment/ladder"
    if file in needs_path or cli.compose("train", overrides).data.get("format") == "shards":
        overrides.append(f"data.path={tmp_path}")
    if file == "tokenizer/file":
        overrides.append(f"tokenizer.path={tmp_path / 'tokenizer.json'}")
    cfg = cli.compose(file if not group else "train", overrides)
    config = check(cfg)
    for callback in cfg.callbacks.values():
        instantiate(callback)
    options = config.trainer.model_dump()
    if options["strategy"] == "fsdp":  # which Lightning's own of that name is not
        options["strategy"] = FullyShardedStrategy()
    options |= {"max_epochs": 1, "accelerator": "cpu", "logger": False}
    L.Trainer(**options, default_root_dir=tmp_path)


def test_trainer_keys_are_lightnings():
    lightnings = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert set(cli.compose("train", []).trainer) < lightnings
    assert set(TrainerConfig.model_fields) < lightnings


def test_every_knob_has_a_comment():
    """In each file that defines knobs; a file that only overrides others' values repeats no comment."""
    lightnings_own = {"trainer/default"}
    for file in FILES:
        if file.startswith(("debug", "experiment")) or file in lightnings_own:
            continue
        for line in (cli.CONF / f"{file}.yaml").read_text().split("\nhydra:")[0].splitlines():
            if "_lr" in line or "batch" in line or "steps" in line:
                assert "#" in line, f"{file}: {line}"


BAD = {
    "optimizer.lr=1e-3": "optimizer.learning_rate",
    "modle=gpt2_tiny": "model",
    "model=gpt3": "gpt2_small",
    "model.n_layer=3": "model.n_layers",
    "batch_size=4": "data.batch_size",
    "learning_rate=1": "optimizer.learning_rate",
    "trainer.max_epoch=3": "trainer.max_epochs",
    "+optimizer.lr=1": "optimizer.learning_rate",
    "schedule.warmup=3": "schedule.warmup_steps",
    "data=wikipedia": "there are: climbmix, fineweb_10b_shards",
    "experiment=boook": "experiment=book",
    "model.n_layers=abc": "model.n_layers=12",
    "model.n_layers=1.5": "model.n_layers=12",
    "model.n_heads=7": "model.n_heads=6 or model.emb_dim=770",
    "model.emb_dim=0": "model.emb_dim=768",
    "model.drop_rate=1.5": "model.drop_rate=0.1",
    "model.vocab_size=100": "model.vocab_size=null",
    "model.qkv_bias=perhaps": "model.qkv_bias=false",
    "model.tie_weights=3.5": "model.tie_weights=false",
    "data.batch_size=0": "data.batch_size=2",
    "data.stride=-1": "data.stride=null",
    "data.train_ratio=1": "data.train_ratio=0.9",
    "data=text": "data.path=",
    "data=shards": "data.path=",
    "data=shards data.path=x data.format=tokens": "data.format=text",
    "optimizer.learning_rate=-1": "optimizer.learning_rate=",
    "optimizer.learning_rate=fast": "optimizer.learning_rate=",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9,0.95]",
    "optimizer.betas=0.9": "'optimizer.betas=[0.9,0.95]'",
    "optimizer.learning_rate=1e-4,4e-4": "-m optimizer.learning_rate=1e-4,4e-4",
    "schedule=constant schedule.warmup_steps=5": "schedule.warmup_steps",
    "data.context_length=512": "model.context_length=512",
    "seed=abc": "seed=123",
    "seed=-1": "seed=123",
    "dry_run=perhaps": "dry_run=false",
    "trainer.accumulate_grad_batches=two": "trainer.accumulate_grad_batches=1",
    "trainer.devices=0": "trainer.devices=1",
    "tokens_per_step=0": "tokens_per_step=524288",
    "tokens_per_step=1000": "tokens_per_step=1024",
    "tokens_per_step=2048 trainer.accumulate_grad_batches=3": "trainer.accumulate_grad_batches=1",
    "trainer.devices=2 trainer.accelerator=cpu tokens_per_step=512": "tokens_per_step=1024",
    "trainer.devices=two": "trainer.devices=1",
    "trainer.accelerator=cpu trainer.devices=-1": "trainer.devices=2",
    "trainer.devices=2 +trainer.use_distributed_sampler=true": "trainer.use_distributed_sampler=false",
    "trainer.min_steps=3": "use +trainer.min_steps=3",
    "trainer.devices=2 trainer.overfit_batches=1": "trainer.devices=1",
    "trainer.num_nodes=2": "trainer.num_nodes=1",
    "trainer.strategy=deepspeed": "trainer.strategy=ddp",
    "trainer.strategy=fsdp trainer.precision=16-mixed": "trainer.precision=bf16-mixed",
    "trainer.gpus=1": "trainer.",
    "schedule.min_lr=1": "schedule.min_lr=0",
    "schedule=linear": "constant",
    "trainer.limit_val_batches=3": "eval.max_tokens=<n>",
    "trainer.limit_val_batches=1": "eval.max_tokens=<n>",
    "+callbacks.mine=3": "~callbacks.mine",
    "logger.csv=yes": "~logger.csv",
    "=1": "key=value",
    "eval.every_steps=0": "eval.every_steps=null",
    "eval.batches=0": "eval.batches=null",
    "checkpoint.every_minutes=-1": "checkpoint.every_minutes=null",
    "trainer.max_epochs=0": "trainer.max_epochs=1",
    "trainer.max_epochs=ten": "trainer.max_epochs=",
    "trainer.precision=fp8": "32-true",
    "trainer.accelerator=quantum": "trainer.accelerator=auto",
    "trainer.max_epochs=-1": "trainer.max_steps=",
    "ckpt_path=nowhere.ckpt": "ckpt_path=",
    "weights=nowhere.ckpt": "weights=",
    "weights=gpt3": "none of gpt2, gpt2-medium, gpt2-large, gpt2-xl",
    "trainer.max_steps=5 schedule.warmup_steps=10": "schedule.warmup_steps=0.2",
    "optimizer=sgd": "there are: adamw, muon",
    "optimizer=muon optimizer.momentum=1": "optimizer.momentum=0.95",
    "schedule=warmup_stable_decay schedule.decay=cubic": "schedule.decay=linear",
    "schedule=warmup_stable_decay trainer.max_steps=9 schedule.decay_steps=9": "schedule.decay_steps=0.2",
    "schedule=warmup_stable_decay schedule.warmup_steps=0.6 schedule.decay_steps=0.6": "schedule.decay_steps=0.2",
    "seed=[": "seed=[ is not an override",
    "callbacks.text_sample=1": "callbacks.text_samples",
    "tags=[a]": "tags is not a key of train",
    "+trainer.max_epoch=3": "not an argument of Lightning's Trainer",
    "+seed=3": "An item is already at 'seed'",
    "-m seed=1,2 optimizer.lr=interval(0,1)": "optimizer.learning_rate",
    "-m model=gpt2_tiny,gpt3": "gpt2_small",
    "model=null": "there are: gpt2_large",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_override_is_one_line_with_its_cure(overrides):
    problems = cli.find_problems("train", overrides.split(), check)
    assert len(problems) == 1, problems
    assert "\n" not in problems[0]
    assert overrides.split()[-1].split("=")[0].lstrip("+").split(".")[-1] in problems[0]
    assert BAD[overrides] in problems[0]


GOOD = [
    "+trainer.plugins=null",
    "~callbacks.loss_plot",
    "schedule=constant",
    "data=the_verdict data.url=https://example.org/a.txt",
    "+callbacks.mine._target_=lightning.pytorch.callbacks.Timer",
    "hydra.run.dir=/tmp/somewhere",
    "trainer.max_time=00:00:10:00",
    "hydra/launcher=basic",
    "data.path=2024",
    "-m optimizer.learning_rate=interval(1e-4,1e-3)",
    "-m model=glob(gpt2_*)",
    "-m model=gpt2_tiny,gpt2_small seed=1,2",
    "model.n_heads=6",
    "+tags=[a]",
    "+tags=[a] tags=[b]",
    "++tags=[a] +notes.author=me ++notes.author=you",
    "++model.n_layers=3",
    "+callbacks.mine={_target_:lightning.pytorch.callbacks.Timer,interval:step} callbacks.mine.interval=epoch",
    "-m +tags=a,b",
    "~experiment",
]


@pytest.mark.parametrize("overrides", GOOD)
def test_good_override_passes(overrides):
    assert cli.find_problems("train", overrides.split(), check) == []


def test_an_argument_that_is_new_in_lightning_composes(monkeypatch):
    def of_the_future(self, *, new_argument=0, **known):
        pass

    overrides = ["+trainer.new_argument=1"]
    assert "new_argument" in cli.find_problems("train", overrides, check)[0]
    monkeypatch.setattr(L.Trainer, "__init__", of_the_future)
    assert cli.find_problems("train", overrides, check) == []
    assert cli.compose("train", overrides).trainer.new_argument == 1


def test_keys_of_an_experiment_of_ones_own(tmp_path, monkeypatch):
    shutil.copytree(cli.CONF, tmp_path / "conf")
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nnotes:\n  author: me\n")
    monkeypatch.setattr(cli, "CONF", tmp_path / "conf")
    assert cli.find_problems("train", ["experiment=mine", "notes.author=you"], check) == []
    (problem,) = cli.find_problems("train", ["experiment=mine", "notes.autor=you"], check)
    assert "did you mean notes.author?" in problem


def test_a_switch_means_what_it_says(text, tiny_run):
    run = tiny_run("model.tie_weights=no", "data.shuffle=off", "trainer.max_steps=1", "callbacks=none", "dry_run=no")
    assert run.module.net.config.tie_weights is False
    assert run.datamodule.config.shuffle is False
    assert run.trainer.global_step == 1


def test_several_problems_at_once():
    overrides = ["model.n_heads=7", "data.batch_size=0", "optimizer.decay=none", "eval.every_steps=0"]
    assert len(cli.find_problems("train", overrides, check)) == 4


def test_command_line_answers_before_anything_heavy_or_written(tmp_path):
    """No torch, no run folder, no traceback, exit status 1."""
    code = (
        "import sys, runpy; sys.argv = ['train', 'model.n_layers=-1', 'optimizer.lr=1']\n"
        "try: runpy.run_module('src.train', run_name='__main__')\n"
        "except SystemExit as stop: status = stop.code\n"
        "print(status, sorted({'torch', 'lightning', 'matplotlib', 'tiktoken'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(cli.CONF.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "1 []\n"
    assert done.stderr.startswith("error: optimizer.lr is not a key of train: did you mean optimizer.learning_rate?")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "export", "compare"])
def test_help_tells_of_the_command_alone_and_loads_nothing_for_it(command, tmp_path):
    """Its purpose, its groups and choices, each key with the comment of conf; neither Hydra's groups nor PyTorch."""
    code = (
        f"import sys, runpy; sys.argv = [{command!r}, '--help']\n"
        f"runpy.run_module('src.{command}', run_name='__main__')\n"
        "print(sorted({'torch', 'lightning', 'matplotlib', 'tiktoken', 'rich', 'tensorboard'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(cli.CONF.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *text, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert text[0].startswith(f"python -m src.{command}: ")
    groups = {line.split()[0] for line in text if line.startswith("  ") and ("*  " in line or line.endswith("*"))}
    own = {
        "train": {"model", "data", "tokenizer", "optimizer", "schedule", "trainer", "callbacks", "logger"},
        "generate": {"generation"},
        "evaluate": {"data"},
        "export": set(),
        "compare": set(),
    }
    assert groups == own.get(command, own["train"])
    keys = {line.split(":")[0].strip() for line in text if line.startswith("  ") and ":" in line}
    assert keys >= {name.split(".")[-1] for name in cli.keys_of(cli.compose(command, []))}


def test_help_shows_what_is_chosen_with_its_own_comments(command):
    status, out, _ = command("train", "optimizer=muon", "schedule=warmup_stable_decay", "seed=7", "--help")
    assert status == 0
    lines = out.splitlines()
    assert "  optimizer   adamw  muon*" in lines
    assert "  seed: 7  # weights, data order and dropout all follow from it" in lines
    assert "    momentum: 0.95  # of the matrices of the blocks" in lines
    assert "    weight_decay: 0.1  # decoupled" in lines  # which it has from adamw.yaml
    assert "    min_lr: null  # where the decay ends; null: a tenth of optimizer.learning_rate" in lines
    assert "    qkv_bias: false  # bias in the query, key and value projections" in lines
    assert "    train_ratio: 0.9  # fraction of the characters that trains; the rest validates" in lines
    _, out, _ = command("train", "experiment=gpt2_124m", "trainer=ddp", "--help")
    lines = out.splitlines()
    assert any(line.startswith("    vocab_size: 50304  # padded") for line in lines)
    assert "    train_ratio: 0.999  # where there is no validation shard" in lines
    assert "    n_layers: 12  # depth" in lines
    assert "    accelerator: auto  # auto, cpu, gpu, mps" in lines  # which it has from default.yaml
    assert any(line.startswith("    devices: auto  # all GPUs of this machine") for line in lines)
    _, out, _ = command("train", "data=shards", "--help")
    assert "    train_ratio: 0.9  # fraction of the tokens that trains if no name has val in it" in out
    status, out, err = command("train", "modle=3", "--help")
    assert (status, out, err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("command", ["generate", "export", "evaluate"])
def test_commands_load_what_they_use(command, tmp_path, small_weights, text):
    """Neither Lightning nor PyTorch's compiler, which a single normal draw on the meta device would import."""
    arguments = {
        "generate": ["prompt=So", "max_new_tokens=2"],
        "export": ["output=out"],
        "evaluate": [f"data.path={text}", "surprises=1"],
    }[command]
    foreign = {"lightning", "torch._dynamo", "tensorboard", "transformers", "pooch", "huggingface_hub"}
    foreign |= set() if command == "evaluate" else {"matplotlib", "rich"}
    code = (
        f"import sys, runpy; sys.argv = {[command, f'weights={small_weights}', *arguments]!r}\n"
        f"runpy.run_module('src.{command}', run_name='__main__')\n"
        f"print(sorted({foreign!r} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(cli.CONF.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_names_nearest_by_part_initials_and_spelling():
    keys = ["optimizer.learning_rate", "optimizer.eps", "data.batch_size", "model.n_layers"]
    for typo, key in itertools.chain([("lr", keys[0]), ("data.bs", keys[2]), ("model.layers", keys[3])]):
        assert nearest(typo, keys) == key


def test_changed_keeps_what_a_user_added():
    config = check(cli.compose("train", ["trainer.max_time=00:00:10:00", "+tags=[a]"]))
    changed = config.changed(trainer=config.trainer.changed(accumulate_grad_batches=2))
    assert changed.trainer.model_dump()["max_time"] == "00:00:10:00"
    assert changed.model_extra == {"tags": ["a"]}
    assert (changed.trainer.accumulate_grad_batches, config.trainer.accumulate_grad_batches) == (2, 1)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize("wrong", ["nosuch=1", "optimizer=nosuch"])
def test_the_config_of_a_wrong_override_is_not_printed(command, wrong):
    status, out, err = command("train", "--cfg", "job", wrong)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and "nosuch" in err and err.count("\n") == 1


def test_a_name_that_is_too_long_for_the_system(command):
    status, _, err = command("train", f"resume={'x' * 300}")
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1
