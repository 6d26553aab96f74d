import pytest
import torch

from src import device


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
