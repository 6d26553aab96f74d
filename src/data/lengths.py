"""Whether a text is long enough, and what would fit if it is not."""

from src.data.config import DataConfig


def check_lengths(config: DataConfig, train: int, val: int, accumulate: int, world_size: int) -> None:
    """Check that so many tokens of training and validation have a window each, and the windows an optimizer step.

    Raises:
        ValueError: too few tokens or windows, with the settings that fit.
    """
    length = config.context_length
    assert length is not None
    if min(train, val) <= length:
        counts = {"training": train, "validation": val}
        have = " and ".join(f"{count} {split} tokens" for split, count in counts.items() if count <= length)
        fits = min(train, val) - 1
        shorter = f"model.context_length={fits} (with weights, data.context_length={fits}) or more text"
        cure = shorter if fits >= 1 else "data.path=<more text>"
        raise ValueError(
            f"data.path={config.source} has {have}, one window needs context_length + 1 = {length + 1}; use {cure}"
        )
    stride = config.stride or length
    windows = len(range(0, train - length - (stride - 1 if config.shift else 0), stride))
    if not windows:
        raise ValueError(f"data.shift=true leaves no window of data.path={config.source}; use data.shift=false")
    if windows >= config.batch_size * world_size * accumulate:
        return
    parts = {"data.batch_size": config.batch_size, "trainer.accumulate_grad_batches": accumulate}
    asked = " ".join(f"{key}={value}" for key, value in parts.items() if value > 1)
    asked += f" on {world_size} devices" if world_size > 1 else ""
    if fits := windows // (config.batch_size * world_size):
        cure = f"trainer.accumulate_grad_batches={fits}"
    elif fits := windows // world_size:
        cure = f"data.batch_size={fits}" + " trainer.accumulate_grad_batches=1" * (accumulate > 1)
    else:
        cure = f"trainer.devices={windows}"
    raise ValueError(
        f"{asked} is more than the {windows} training windows of data.path={config.source}; "
        f"use {cure}, a smaller data.stride or more text"
    )
