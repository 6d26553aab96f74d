"""One step of decoding: from the logits of the last position to the next token."""

import torch
from torch import Tensor


def next_token(
    logits: Tensor, temperature: float = 0.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each row, ``(B, 1)`` int64, from its last logits ``(B, V)``.

    ``temperature=0`` takes the likeliest. Otherwise the logits are cut to the ``top_k`` largest (Fan et al. 2018;
    None, 0 or more than V: all), divided by the temperature, and drawn from with ``generator``.

    Raises:
        ValueError: a negative temperature or ``top_k``.
    """
    if temperature < 0 or (top_k or 0) < 0:
        raise ValueError(f"temperature={temperature} and top_k={top_k} cannot be negative: temperature=1.0 top_k=25")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    if top_k and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)  # (B, V)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)  # (B, 1)
