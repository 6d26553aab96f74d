"""What is trained: every step equals a plain PyTorch loop, whatever watches it."""

import itertools
import math
import shutil
from functools import partial

import pytest
import torch
from conftest import FAST, GPT2, TINY, column, metrics_of
from torch.nn import functional as F

from src.checkpoint.find import read_checkpoint
from src.interop.huggingface import write_huggingface
from src.interop.weights import load_weights, save_weights
from src.kernels.training import CompiledTraining
from src.model.config import GPTConfig
from src.model.gpt import GPT
from src.training.module import PretrainingModule

EXACT = ("model.drop_rate=0", "model.init=torch", "data.shuffle=false", "schedule=constant", *FAST)


def plain_losses(text, model, stride, batch_size, accumulate, clip, steps, decay) -> list[float]:
    """The book's loop in twenty lines, on windows cut by hand: a step is the mean over all windows of ``accumulate``
    batches, and an epoch has whole steps only."""
    whole = text.read_text()
    tokens = list(whole[: int(0.9 * len(whole))].encode())
    T = model.context_length
    starts = range(0, len(tokens) - T, stride)
    windows = [(tokens[i : i + T], tokens[i + 1 : i + T + 1]) for i in starts]
    size = batch_size * accumulate
    epoch = [windows[i : i + size] for i in range(0, len(windows) - size + 1, size)]
    torch.manual_seed(123)
    net = GPT(model)
    matrices = [p for p in net.parameters() if p.dim() > 1 or decay == "all"]
    others = [p for p in net.parameters() if p.dim() <= 1 and decay != "all"]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for step in itertools.islice(itertools.cycle(epoch), steps):
        optimizer.zero_grad()
        inputs, targets = (torch.tensor(side) for side in zip(*step, strict=True))
        loss = F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("shape", "stride", "batch_size", "accumulate", "clip", "decay"),
    [
        ({}, 16, 2, 1, None, "all"),
        ({"qkv_bias": True}, 7, 3, 1, 0.5, "matrices"),
        ({"tie_weights": True, "n_heads": 2}, 16, 5, 1, 1.0, "matrices"),
        ({"tie_weights": True, "qkv_bias": True, "n_layers": 1}, 40, 1, 1, None, "matrices"),
        ({"context_length": 33, "emb_dim": 20}, 1, 4, 1, 0.1, "all"),
        ({}, 16, 4, 5, 1.0, "matrices"),  # 13 batches: two steps of 5, and 3 that are left over
    ],
)
def test_every_step_equals_a_plain_loop(tiny_run, text, shape, stride, batch_size, accumulate, clip, decay):
    model = GPTConfig(
        **{
            "vocab_size": 257,
            "context_length": 16,
            "emb_dim": 32,
            "n_heads": 4,
            "n_layers": 2,
            "drop_rate": 0.0,
            "init": "torch",
            **shape,
        }
    )
    run = tiny_run(
        *EXACT,
        *(f"model.{key}={value}" for key, value in shape.items()),
        f"data.stride={stride}",
        f"data.batch_size={batch_size}",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.gradient_clip_val={'null' if clip is None else clip}",
        "trainer.max_epochs=null",
        "trainer.max_steps=7",
        "optimizer.learning_rate=1e-3",
        f"optimizer.decay={decay}",
    )
    expected = plain_losses(text, model, stride, batch_size, accumulate, clip, 7, decay)
    assert column(run, "train/loss") == pytest.approx(expected, abs=1e-4)
    assert column(run, "step") == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_accumulated_gradient_is_that_of_one_batch(tiny_run, monkeypatch, accumulate):
    """In each step of three epochs that are no multiple of the batch."""
    found = []
    for batch_size, batches in (3, accumulate), (3 * accumulate, 1):
        steps = []
        monkeypatch.setattr(
            PretrainingModule,
            "on_before_optimizer_step",
            lambda self, _, steps=steps: steps.append([parameter.grad.clone() for parameter in self.parameters()]),
        )
        run = tiny_run(
            *FAST, "trainer.max_epochs=3", "model.drop_rate=0", "data.stride=13",
            f"data.batch_size={batch_size}", f"trainer.accumulate_grad_batches={batches}",
        )  # fmt: skip
        windows = len(run.datamodule.train_windows)
        assert windows % (3 * accumulate)
        assert len(steps) == windows // (3 * accumulate) * 3
        found.append(steps)
    for step, expected in zip(*found, strict=True):
        for one, other in zip(step, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_watching_changes_nothing(tiny_run):
    """Dropout, shuffling and accumulation on: losses and weights are bit-identical with and without every callback."""
    common = ("trainer.accumulate_grad_batches=2", "trainer.max_epochs=2", "data.batch_size=6", "data.stride=12")
    watched = tiny_run(*common, "eval.every_steps=7", "callbacks.text_samples.max_new_tokens=5")
    blind = tiny_run(*common, *FAST)
    assert column(watched, "train/loss") == column(blind, "train/loss")
    assert column(watched, "grad_norm") == column(blind, "grad_norm")
    for mine, other in zip(watched.module.parameters(), blind.module.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_seed_decides_everything(tiny_run):
    first, again, other = (
        column(tiny_run(*FAST, "trainer.max_steps=4", f"seed={seed}"), "train/loss") for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_value_clipping_is_lightnings(tiny_run):
    clipped = tiny_run(*EXACT, "trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=1e-4")
    free = tiny_run(*EXACT, "trainer.gradient_clip_val=null")
    assert column(clipped, "train/loss")[0] == column(free, "train/loss")[0]
    assert column(clipped, "train/loss")[1:] != column(free, "train/loss")[1:]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_clipping_works_with_fused_adamw_in_every_precision(tiny_run, precision):
    run = tiny_run(*FAST, f"trainer.precision={precision}", "optimizer.fused=true", "trainer.gradient_clip_val=0.01")
    norms = column(run, "grad_norm")
    assert len(norms) == run.trainer.global_step > 10
    assert all(norm > 0.01 for norm in norms)  # the norm before clipping
    assert run.trainer.optimizers[0].defaults["fused"] is True


def test_learning_rate_moves_per_optimizer_step(tiny_run):
    run = tiny_run(
        *FAST,
        "trainer.accumulate_grad_batches=2",
        "trainer.max_steps=10",
        "optimizer.learning_rate=1e-3",
        "schedule.warmup_steps=5",
        "schedule.min_lr=1e-4",
    )
    expected = [0, 2e-4, 4e-4, 6e-4, 8e-4] + [1e-4 + 9e-4 * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]
    assert column(run, "lr") == pytest.approx(expected, abs=1e-12)


def test_logged_rows(tiny_run):
    run = tiny_run(*FAST, "trainer.max_steps=10", "trainer.log_every_n_steps=3", "data.batch_size=4")
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert [row["tokens_seen"] for row in rows] == [3 * 64, 6 * 64, 9 * 64]
    assert rows[-1]["epoch"] == pytest.approx(9 / len(run.datamodule.train_dataloader()))


@pytest.mark.parametrize(
    "limits",
    [
        ("trainer.max_epochs=3",),
        ("trainer.max_epochs=2", "trainer.accumulate_grad_batches=3"),
        ("trainer.max_steps=5",),
        ("trainer.max_epochs=3", "trainer.limit_train_batches=4"),
        ("trainer.max_epochs=2", "trainer.limit_train_batches=0.5"),
        ("trainer.overfit_batches=2", "trainer.max_epochs=4"),
    ],
)
def test_limits_are_lightnings_and_known_beforehand(tiny_run, limits):
    run = tiny_run(*FAST, *limits)
    assert run.module.total_steps == run.trainer.estimated_stepping_batches == run.trainer.global_step


def test_max_time_stops_the_run_in_order(tiny_run):
    run = tiny_run("trainer.max_time=00:00:00:01", "trainer.max_epochs=100000", "callbacks=none")
    assert 0 < run.trainer.global_step < 100000
    assert run.record["status"] == "completed"
    assert (run.folder / "checkpoints" / "last.ckpt").exists()
    assert column(run, "val/loss")[-1] == pytest.approx(run.record["val_loss"])


def test_checkpoint_needs_nothing_else(tiny_run):
    run = tiny_run("callbacks=none", "trainer.max_steps=3")
    for name in "best", "last":
        path = run.folder / "checkpoints" / f"{name}.ckpt"
        content = torch.load(path, weights_only=True)
        assert content["optimizer_states"][0]["state"]
        loaded = PretrainingModule.load_from_checkpoint(path)
        assert loaded.net.config == run.module.net.config
        assert loaded.optimizer_config == run.module.optimizer_config
        tokens = torch.randint(257, (1, 8))
        assert torch.equal(loaded.eval()(tokens), run.module.eval()(tokens))


def test_best_checkpoint_is_the_lowest_val_loss(tiny_run):
    # A rate this high overshoots: the loss falls, then rises.
    run = tiny_run("callbacks=none", "trainer.max_steps=12", "eval.every_steps=2", "optimizer.learning_rate=3.0")
    losses = {row["step"]: row["val/loss"] for row in metrics_of(run) if row["step"] and "val/loss" in row}
    best = torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == min(losses, key=losses.get) < run.trainer.global_step
    assert not list((run.folder / "checkpoints").glob("*.part"))


def test_last_checkpoint_by_steps(tiny_run):
    run = tiny_run("callbacks=none", "trainer.max_steps=5", "checkpoint.every_steps=2", "trainer.limit_val_batches=0")
    last = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 5


def test_weights_alone(tiny_run, tmp_path):
    tiny_run = partial(tiny_run, model=GPT2)
    run = tiny_run(*FAST, "trainer.max_steps=2", "model.tie_weights=true")
    path = tmp_path / "weights.pt"
    save_weights(run.module.net, path)
    net = load_weights(path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), run.module.net.parameters(), strict=True))
    assert path.stat().st_size < 1.1 * sum(p.numel() * 4 for p in net.parameters())
    continued = tiny_run(
        "model.tie_weights=true", f"weights={path}", "trainer.max_steps=1", "callbacks=none", "eval.every_steps=1"
    )
    assert column(continued, "val/loss")[0] < 10.82  # not a fresh draw


def test_the_model_comes_from_the_weights(tiny_run, tmp_path, long_text):
    config = GPTConfig(50304, 24, 16, 2, 1, qkv_bias=True, tie_weights=True)
    net = GPT(config)
    write_huggingface(tmp_path, config, net.state_dict(), None)
    overrides = (f"weights={tmp_path}", "trainer.max_steps=2", "callbacks=none", "optimizer.learning_rate=1e-9",
                 "model.drop_rate=0.2", f"data.path={long_text}")  # fmt: skip
    tiny_run = partial(tiny_run, model=())
    run = tiny_run(*overrides)
    assert run.module.net.config == config.changed(drop_rate=0.2)
    assert run.record["config"]["model"]["n_layers"] == 1
    assert run.datamodule.config.context_length == 24
    torch.testing.assert_close(run.module.net.pos_emb.weight, net.pos_emb.weight, atol=1e-6, rtol=0)
    assert run.module.net.head.weight is run.module.net.tok_emb.weight
    shorter = tiny_run(*overrides, "data.context_length=8")
    assert shorter.module.net.config == run.module.net.config
    assert shorter.record["tokens_seen"] == 2 * 2 * 8
    with pytest.raises(
        ValueError, match=r"model\.n_layers=7 differs from 1 in .*, which brings its own model; leave out model"
    ):
        tiny_run(*overrides, "model.n_layers=7")
    with pytest.raises(ValueError, match=r"data\.context_length=25 is more than the model's 24"):
        tiny_run(*overrides, "data.context_length=25")


def test_a_run_that_began_with_weights_goes_on_without_them(tiny_run, tmp_path, long_text):
    config = GPTConfig(50257, 24, 16, 2, 1, qkv_bias=True, tie_weights=True)
    write_huggingface(tmp_path, config, GPT(config).state_dict(), None)
    overrides = (f"weights={tmp_path}", f"data.path={long_text}", "callbacks=none", "schedule=constant")
    tiny_run = partial(tiny_run, model=())
    whole = tiny_run(*overrides, "trainer.max_steps=5")
    cut = tiny_run(*overrides, "trainer.max_steps=3")
    (tmp_path / "model.safetensors").unlink()
    rest = tiny_run(*overrides, "trainer.max_steps=5", resume=cut.folder)
    assert rest.record["config"]["model"] == whole.record["config"]["model"]
    assert column(rest, "train/loss") == column(whole, "train/loss")
    assert torch.equal(rest.module.net.tok_emb.weight, whole.module.net.tok_emb.weight)


def test_continued_run_trains_every_epoch_in_its_own_order(tiny_run):
    """Two epochs, then two more from the checkpoint, equal four in one go."""
    common = ("callbacks=none", "schedule=constant", "trainer.limit_val_batches=0", "data.batch_size=4")
    whole = tiny_run(*common, "trainer.max_epochs=4")
    half = tiny_run(*common, "trainer.max_epochs=2")
    ckpt = half.folder / "checkpoints" / "last.ckpt"
    rest = tiny_run(*common, "trainer.max_epochs=4", f"ckpt_path={ckpt}")
    assert column(half, "train/loss") + column(rest, "train/loss") == column(whole, "train/loss")
    assert rest.record["optimizer_steps"] == whole.record["optimizer_steps"]
    assert rest.record["tokens_seen"] == whole.record["tokens_seen"]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("trainer.max_steps=7",), ("trainer.max_epochs=2",)),  # cut within an epoch
        (("trainer.max_steps=12",), ("trainer.max_epochs=2",)),  # exactly one epoch
        (("trainer.max_epochs=1",), ("trainer.max_steps=20",)),
    ],
)
def test_a_run_cut_short_goes_on_where_it_stopped(tiny_run, first, then):
    common = ("callbacks=none", "schedule=constant", "data.batch_size=4", "trainer.max_epochs=null")  # 12 batches
    cut = tiny_run(*common, *first)
    whole = tiny_run(*common, *then)
    for name in "last", "best":
        ckpt = cut.folder / "checkpoints" / f"{name}.ckpt"
        rest = tiny_run(*common, *then, f"ckpt_path={ckpt}")
        assert column(cut, "train/loss") + column(rest, "train/loss") == column(whole, "train/loss"), name
        assert column(rest, "step")[-1] == column(whole, "step")[-1]
        assert rest.record["val_loss"] == whole.record["val_loss"]


def test_overrides_of_a_continued_run_hold(tiny_run):
    cut = tiny_run("callbacks=none", "trainer.max_steps=4", "trainer.limit_val_batches=0")
    ckpt = f"ckpt_path={cut.folder / 'checkpoints' / 'last.ckpt'}"
    rest = tiny_run(*FAST, ckpt, "trainer.max_steps=6", "schedule=constant", "optimizer.learning_rate=0.05",
                    "optimizer.weight_decay=0.3", "optimizer.betas=[0.8,0.9]")  # fmt: skip
    assert column(rest, "lr") == [0.05, 0.05]
    (decayed, _) = rest.trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], decayed["betas"]) == (0.3, (0.8, 0.9))


def test_a_run_that_diverged_fails(tiny_run):
    with pytest.raises(ValueError, match="diverged"):
        tiny_run(
            "optimizer.learning_rate=1e30", "trainer.max_steps=4", "callbacks=none", "trainer.gradient_clip_val=null"
        )


def test_continuing_with_another_model_is_refused(tiny_run, tmp_path):
    run = tiny_run("callbacks=none", "trainer.max_steps=1", "trainer.limit_val_batches=0")
    ckpt = run.folder / "checkpoints" / "last.ckpt"
    weights = tmp_path / "weights.pt"
    save_weights(run.module.net, weights)
    with pytest.raises(ValueError, match=r"no optimizer state to resume from; use weights="):
        tiny_run(f"ckpt_path={weights}")
    with pytest.raises(
        ValueError, match=r"model\.n_layers=3 differs from 2 in .*, which brings its own model; leave out model"
    ):
        tiny_run(f"ckpt_path={ckpt}", "model.n_layers=3")


def test_a_run_without_a_step_is_an_error(tiny_run):
    run = tiny_run("callbacks=none", "trainer.max_steps=2", "trainer.limit_val_batches=0")
    ckpt = run.folder / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="there is nothing left to do"):
        tiny_run(*FAST, "trainer.max_steps=2", f"ckpt_path={ckpt}")


def test_tokens_per_step_sets_the_accumulation(tiny_run):
    by_tokens = tiny_run("tokens_per_step=96", *FAST, "trainer.enable_checkpointing=true")  # 2 windows of 16, 3 times
    by_batches = tiny_run("trainer.accumulate_grad_batches=3", *FAST)
    assert column(by_tokens, "train/loss") == column(by_batches, "train/loss")
    assert by_tokens.record["config"]["trainer"]["accumulate_grad_batches"] == 3
    assert column(by_tokens, "tokens_seen")[:2] == [96, 192]
    last = by_tokens.folder / "checkpoints/last.ckpt"
    with pytest.raises(
        ValueError, match=r"tokens_per_step=80 is not a multiple of the 32 tokens .*; use tokens_per_step=64"
    ):
        tiny_run(f"weights={last}", "tokens_per_step=80")
    shorter = tiny_run(f"weights={last}", "data.context_length=8", "tokens_per_step=80", model=())
    assert shorter.record["config"]["trainer"]["accumulate_grad_batches"] == 5


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_training_is_the_same_but_for_rounding_and_leaves_no_trace_in_checkpoints(tiny_run):
    eager, compiled = (
        tiny_run("model.drop_rate=0", "trainer.max_steps=4", f"compile={on}") for on in ("false", "true")
    )
    assert [isinstance(run.module.net, CompiledTraining) for run in (eager, compiled)] == [False, True]
    assert column(compiled, "train/loss") == pytest.approx(column(eager, "train/loss"), abs=1e-4)
    keys = [read_checkpoint(run.folder / "checkpoints/last.ckpt")["state_dict"].keys() for run in (eager, compiled)]
    assert keys[0] == keys[1]


def test_a_deterministic_run_is_so_when_compiled_and_fills_no_memory(tiny_run, at_batch):
    def look(module):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch._inductor.config.deterministic
        assert not torch.utils.deterministic.fill_uninitialized_memory
        seen.append(module)

    seen = []
    at_batch(1, look)
    try:
        tiny_run("trainer.deterministic=true", "trainer.max_steps=2", *FAST)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert seen


def test_attention_flash_trains_without_cudnn(tiny_run, at_batch):
    """And the next run in this process has its own choice."""
    allowed = []
    for attention in "flash", "auto":
        at_batch(1, lambda module: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
        tiny_run(f"attention={attention}", "trainer.max_steps=2", *FAST)
    assert allowed == [False, True]


@pytest.mark.parametrize("model", [TINY, (*TINY, "model.emb_dim=64", "model.n_layers=4")])
def test_overfitting_brings_the_loss_near_zero_and_stops_there(tiny_run, model):
    run = tiny_run("debug=overfit", "logger=csv", "trainer.max_epochs=null", model=model)
    losses = column(run, "train/loss")
    assert losses[0] > 5
    assert losses[-1] < 0.05 <= min(losses[:-1])
    assert run.record["train_loss"] < 0.06
    assert run.record["optimizer_steps"] == len(losses) < 500
