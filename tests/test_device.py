import pytest
import torch

from src import device, memory


def test_precision_follows_the_hardware(monkeypatch):
    for capabilities, precision in (
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"avx512_f": True}, "32-true"),
        ({}, "32-true"),
    ):
        monkeypatch.setattr(device, "_cpu_capabilities", lambda capabilities=capabilities: capabilities)
        assert device.pick_precision("cpu") == precision
    for native in True, False:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert device.pick_precision("cuda") == ("bf16-mixed" if native else "32-true")
    assert device.pick_precision("mps") == "32-true"


@pytest.mark.parametrize(
    ("cuda", "mps", "auto"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")]
)
def test_accelerator_is_picked_as_lightning_does(monkeypatch, cuda, mps, auto):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device.pick_accelerator("auto") == auto
    assert device.pick_accelerator("cpu") == "cpu"
    if auto == "cpu":
        for absent in "gpu", "cuda", "mps":
            with pytest.raises(ValueError, match=f"trainer.accelerator={absent} is not on this machine"):
                device.pick_accelerator(absent)
    else:
        assert device.pick_accelerator("gpu") == auto


def test_the_tightest_control_group_counts(tmp_path, monkeypatch):
    """SLURM limits a job and its step, and puts the processes into tasks below."""
    (tmp_path / "job" / "step" / "task").mkdir(parents=True)
    for group, limit in {"job": "max", "job/step": f"{2**20}"}.items():
        for name, value in {"memory.max": limit, "memory.current": "1000", "memory.stat": "inactive_file 24\n"}.items():
            (tmp_path / group / name).write_text(value)
    (tmp_path / "own").write_text("0::/job/step/task\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    assert memory.host_memory() == 2**20
    assert memory.free_memory() == 2**20 - 1000 + 24
