"""What must hold on a CUDA device. ``GPU_TESTS=cpu`` runs these tests on a CPU, to check the tests themselves."""

import copy
import math
import os
import signal

import pytest
import torch
from conftest import FAST, column
from interrupting import first_difference
from torch.nn import functional as F

from src.checkpoint.interruption import Interrupted
from src.data.datamodule import TextDataModule
from src.device import is_out_of_memory
from src.generation.decode import generate
from src.interop.huggingface import write_huggingface
from src.interop.weights import load_weights
from src.kernels.loss import head_and_loss
from src.runs.record import read_record

DEVICE = "cpu" if os.environ.get("GPU_TESTS") == "cpu" else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device, or GPU_TESTS=cpu"
)

RUN = (  # heads of 64 as in GPT-2; the vocabulary is given, because only a GPU pads it
    "model.context_length=64", "model.emb_dim=128", "model.n_heads=2", "model.tie_weights=true",
    "tokenizer=byte", "model.vocab_size=320", "data.batch_size=4", "data.stride=16", "trainer.max_epochs=null",
    f"trainer.accelerator={DEVICE}",
)  # fmt: skip
REPEATABLE = (
    "trainer.deterministic=true", "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2",
    "eval.batches=2", "callbacks.text_samples.max_new_tokens=3", "callbacks.text_samples.sampling.top_p=0.9",
    "~callbacks.loss_plot",
)  # fmt: skip
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.fixture(autouse=True)
def no_tf32_and_no_lasting_settings(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product of a process
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "overrides",
    ["", "compile=true", "activation_checkpointing=true", "trainer.strategy=ddp", "trainer.strategy=fsdp"],
)
def test_losses_are_those_of_plain_operations_on_the_cpu(tiny_run, overrides):
    """Of 20 steps in float32, without dropout, which draws other numbers on a GPU."""
    common = (*RUN, *FAST, "model.drop_rate=0", "trainer.max_steps=20")
    expected = tiny_run(*common, "trainer.accelerator=cpu", "kernels=plain")
    found = tiny_run(*common, *overrides.split())
    assert found.module.device.type == DEVICE
    losses = column(found, "train/loss")
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    assert losses == pytest.approx(column(expected, "train/loss"), abs=1e-4)
    assert column(found, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=1e-3)


@COMPILED
@pytest.mark.parametrize(("precision", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_fused_loss_and_its_gradients_against_float64(compiled, precision, close):
    N, V, C = (4096, 50304, 768) if DEVICE == "cuda" else (1024, 1000, 64)  # more rows than the loss takes at a time
    hidden, head = torch.randn(1, N, C), 0.05 * torch.randn(V, C)
    targets = torch.randint(0, V, (1, N), device=DEVICE)
    targets[0, ::97] = -100

    def values_of(loss, dtype):
        leaves = [one.to(precision).to(DEVICE, dtype).requires_grad_() for one in (hidden, head)]
        value = loss(*leaves)
        value.backward()
        return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    exact = values_of(lambda h, w: F.cross_entropy((h @ w.T).flatten(0, 1), targets.flatten()), torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16):
        found = values_of(lambda h, w: head_and_loss(h, w, targets, compiling=compiled), torch.float32)
    for want, got, limit in zip(exact, found, (min(close, 1e-4), close, close), strict=True):
        assert (got - want).norm() < limit * want.norm()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_half_precision_with_clipping_trains(tiny_run, precision):
    run = tiny_run(
        *RUN, *FAST, f"trainer.precision={precision}", "trainer.gradient_clip_val=0.5", "trainer.max_steps=40"
    )
    losses, norms = column(run, "train/loss"), column(run, "grad_norm")
    assert len(losses) == 40 and all(map(math.isfinite, losses))
    assert max(norms) > 0.5  # so that something was clipped
    assert sum(losses[-5:]) / 5 < losses[0] - 2
    assert all(parameter.isfinite().all() for parameter in run.module.parameters())


@COMPILED
def test_repeated_or_stopped_and_resumed_to_the_same_bits(tiny_run, at_batch, tmp_path, compiled):
    """In losses, gradient norms, evaluations, text samples and checkpoints; with dropout and in bfloat16. SIGTERM comes
    between the two micro-batches of a step in the middle."""
    common = (*RUN, *REPEATABLE, "trainer.max_steps=12", "eval.every_steps=4", f"compile={compiled}")
    whole, again = tiny_run(*common), tiny_run(*common)
    assert first_difference(whole.folder, again.folder) is None
    cut = tmp_path / "cut"
    at_batch(14, lambda module: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tiny_run(*common, folder=cut)
    assert read_record(cut)["optimizer_steps"] == 8
    tiny_run(*common, resume=cut)
    assert first_difference(whole.folder, cut) is None


@pytest.fixture
def net(small_net):
    return copy.deepcopy(small_net).to(DEVICE)


def test_greedy_tokens_with_a_cache_a_cuda_graph_and_neither(net):
    """In float32, of 1 and of 3 rows; beyond the context, where the cache is read again."""
    for rows in 1, 3:
        prompt = torch.randint(net.config.vocab_size, (rows, 5)).to(DEVICE)
        expected = prompt
        with torch.no_grad():
            for _ in range(60):
                logits = net(expected[:, -net.config.context_length :])[:, -1]
                expected = torch.cat([expected, logits.argmax(dim=-1, keepdim=True)], dim=1)
        assert expected[0].unique().numel() > 10
        for graph in False, True:
            assert torch.equal(generate(net, prompt, 60, cuda_graph=graph), expected), graph


def test_greedy_tokens_and_logits_are_those_of_transformers(net, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_huggingface(tmp_path, net.config, net.state_dict(), None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE).eval()
    tokens = torch.randint(net.config.vocab_size, (3, 8)).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(net(tokens), theirs(tokens).logits, atol=1e-3, rtol=1e-4)
    expected = theirs.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(net, tokens, 24), expected)


def test_a_run_exported_to_hugging_face_has_the_same_logits(tiny_run, command, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = tiny_run(*RUN, "callbacks=none", "trainer.limit_val_batches=0", "trainer.max_steps=5")
    status, _, err = command("export", f"weights={run.folder}", f"output={tmp_path / 'model'}")
    assert status == 0, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE).eval()
    tokens = torch.arange(48, device=DEVICE).view(2, 24)
    with torch.no_grad():
        for ours in run.module.net.eval().to(DEVICE), load_weights(run.folder).to(DEVICE).eval():
            logits = ours(tokens)[..., :257]  # without the padding
            torch.testing.assert_close(theirs(tokens).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_wait_in_pinned_memory(text, workers):
    data = TextDataModule(path=str(text), context_length=16, batch_size=4, num_workers=workers)
    data.prepare_data()
    data.setup()
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.is_pinned() == targets.is_pinned() == (DEVICE == "cuda")
    assert torch.equal(inputs[:, 1:].to(DEVICE, non_blocking=True), targets[:, :-1].to(DEVICE))


def test_lack_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8, device=DEVICE)
    assert is_out_of_memory(error.value)
