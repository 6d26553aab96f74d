"""A decoding step as a CUDA graph: one call launches hundreds of small kernels."""

import torch
from torch import Tensor

from src.model.cache import KVCache
from src.model.gpt import GPT

WARM_UP = 3  # steps before the recording, during which libraries allocate


class StepGraph:
    """The step of ``net`` from one more token of each row to hidden states, recorded once and replayed for each token.

    It takes over ``cache``, which it fixes to its full length, and is to be made in evaluation mode and without
    gradients. Off by default: not yet run on a GPU.
    """

    def __init__(self, net: GPT, cache: KVCache, tokens: Tensor) -> None:
        self._cache = cache
        self._tokens = tokens.clone()  # (B, 1)
        length = cache.length
        cache.fix()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(min(WARM_UP, net.config.context_length - length)):
                net.hidden_states(self._tokens, cache)
            cache.rewind(length)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._hidden = net.hidden_states(self._tokens, cache)  # (B, 1, C)
        cache.rewind(length)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The hidden states ``(B, 1, C)`` of the next ``tokens`` ``(B, 1)``; the next call overwrites them."""
        self._tokens.copy_(tokens)
        self._graph.replay()  # which advances the cache's position on the device
        self._cache.length += 1
        return self._hidden
