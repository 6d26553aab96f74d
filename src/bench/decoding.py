"""Our generation, timed."""

from multiprocessing.connection import Connection

import torch
from torch import Tensor

from src.bench.rivals import serve
from src.device import seconds_of
from src.generation.decode import generate
from src.kernels.install import pack_for_decoding
from src.model.config import GPTConfig
from src.model.flops import multiplying_parameters
from src.model.gpt import GPT


def work(connection: Connection, config: GPTConfig, prompt: Tensor, device: str) -> None:
    """A rival that answers a number of new tokens, a dtype and whether to record a CUDA graph with the seconds that
    greedy decoding takes."""
    torch.manual_seed(0)
    nets = {dtype: GPT(config).to(device, dtype).eval() for dtype in (torch.float32, torch.bfloat16)}
    for net in nets.values():
        pack_for_decoding(net)

    def run(new_tokens: int, dtype: torch.dtype, cuda_graph: bool = False) -> float:
        tokens = prompt.to(device)
        return seconds_of(lambda: generate(nets[dtype], tokens, new_tokens, cuda_graph=cuda_graph), device)

    serve(connection, run)


def bytes_per_token(config: GPTConfig, dtype: torch.dtype) -> int:
    """Bytes to read from memory for each new token of one row: all the weights that multiply."""
    return multiplying_parameters(config) * dtype.itemsize
