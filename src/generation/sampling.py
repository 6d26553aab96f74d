"""One step of decoding: from the logits of the last position to the next token."""

import torch
from torch import Tensor


def next_token(
    logits: Tensor,
    temperature: float | Tensor = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row, ``(B, 1)`` int64, from its last logits ``(B, V)``.

    ``temperature=0`` takes the likeliest. Otherwise the logits are cut to the ``top_k`` largest (Fan et al. 2018;
    None, 0 or more than V: all), divided by the temperature, and drawn from with ``generator``. A temperature of shape
    ``(B, 1)`` gives each row its own.

    Raises:
        ValueError: a negative temperature or ``top_k``.
    """
    temperatures = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    if temperatures.min() < 0 or (top_k or 0) < 0:
        raise ValueError(f"temperature={temperature} and top_k={top_k} cannot be negative: temperature=1.0 top_k=25")
    likeliest = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    if not temperatures.any():
        return likeliest
    if top_k and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    scaled = logits.float() / temperatures.masked_fill(temperatures == 0, 1.0)
    drawn = torch.multinomial(torch.softmax(scaled, dim=-1), num_samples=1, generator=generator)  # (B, 1)
    return torch.where(temperatures == 0, likeliest, drawn)
