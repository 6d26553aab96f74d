"""A decoding step as a CUDA graph: hundreds of small kernels started by one call."""

import torch
from torch import Tensor

from src.model.cache import KVCache
from src.model.gpt import GPT

WARM_UP = 3  # steps before the recording, in which libraries allocate


class StepGraph:
    """What ``net`` makes of one more token of each row, recorded once and replayed for each further token.

    ``cache`` is fixed and belongs to the recording, to be made in evaluation mode and without gradients. Not yet run on
    a GPU by its authors; off by default.
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
        """The hidden states ``(B, 1, C)`` of ``tokens`` ``(B, 1)``, which come next; overwritten by the next call."""
        self._tokens.copy_(tokens)
        self._graph.replay()  # which moves the cache's place on the device
        self._cache.length += 1
        return self._hidden
