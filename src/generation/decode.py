"""The decoding loop: read the prompt once, then one token at a time from the cache."""

import torch
from torch import Tensor

from src.generation.sampling import next_token
from src.model.cache import KVCache
from src.model.gpt import GPT


@torch.inference_mode()
def generate(
    net: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float | Tensor = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue ``tokens`` ``(B, T)`` by ``max_new_tokens``: ``(B, T + max_new_tokens)`` int64.

    Beyond ``context_length`` the window slides: each further token is predicted from the last ``context_length``.
    ``net`` evaluates without dropout and gets its training mode back. See :func:`~src.generation.sampling.next_token`
    for ``temperature``, ``top_k`` and ``generator``.

    Raises:
        ValueError: an empty prompt, for which there is no next token.
    """
    if tokens.shape[1] == 0:
        raise ValueError("an empty prompt has no next token: start from the end-of-text token, 50256")
    window = net.config.context_length
    training = net.training
    net.eval()
    try:
        weight = net.tok_emb.weight
        cache = KVCache(net.config, tokens.shape[0], weight.device, weight.dtype)
        unread = tokens[:, -window:]
        for _ in range(max_new_tokens):
            if cache.length + unread.shape[1] > window:  # learned positions: a moved window is read anew
                cache.length, unread = 0, tokens[:, -window:]
            logits = net(unread, cache)[:, -1]  # (B, V)
            unread = next_token(logits, temperature, top_k, generator)  # (B, 1)
            tokens = torch.cat([tokens, unread], dim=1)
    finally:
        net.train(training)
    return tokens
