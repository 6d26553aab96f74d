"""Other packages' GPT models of the same size, trained and sampled as these packages do."""

import itertools
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.bench.rivals import serve
from src.device import seconds_of
from src.model.config import GPTConfig


def train(
    connection: Connection,
    peer: str,
    config: GPTConfig,
    batches: Tensor,
    accumulate: int,
    precision: str,
    device: str,
) -> None:
    """A rival that answers a number of steps of ``accumulate`` batches with their seconds; ``batches``
    ``(N, B, T + 1)`` are repeated.

    The book's loop neither clips nor fuses AdamW; transformers' Trainer does both; litgpt clips.
    """
    net, logits_of = _model(peer, config)
    net.to(device).train()
    fused: dict[str, Any] = {"fused": True} if peer == "transformers" else {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-4, weight_decay=0.1, **fused)
    mixed = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")
    endless = itertools.cycle(batches)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            for batch in itertools.islice(endless, accumulate):
                batch = batch.to(device)
                with mixed:
                    logits = logits_of(batch[:, :-1])  # (B, T, V)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
                (loss / accumulate).backward()
            if peer != "book":
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

    serve(connection, lambda steps: seconds_of(lambda: run(steps), device))


def generate(connection: Connection, peer: str, config: GPTConfig, prompt: Tensor, device: str) -> None:
    """A rival that answers a number of new tokens and a dtype with the seconds that greedy decoding takes."""
    net, _ = _model(peer, config)
    net.to(device).eval()

    def run(new_tokens: int, dtype: torch.dtype) -> float:
        net.to(dtype)
        tokens = prompt.to(device)
        return seconds_of(lambda: _continue(peer, net, tokens, new_tokens, config.context_length), device)

    serve(connection, run)


def _continue(peer: str, net: Any, tokens: Tensor, new_tokens: int, context_length: int) -> None:
    if peer == "book":
        from llms_from_scratch.ch05 import generate

        generate(net, tokens, new_tokens, context_length)
    else:
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        mask = torch.ones_like(tokens)
        net.generate(tokens, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=0, **lengths)


def _model(peer: str, config: GPTConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A model of ``config``'s size, and its function from tokens ``(B, T)`` to logits ``(B, T, V)``."""
    if peer == "book":
        from llms_from_scratch.ch04 import GPTModel

        keys = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias")
        net = GPTModel({key: getattr(config, key) for key in keys})
        return net, net
    if peer == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        drop: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate)
        sizes = {"n_positions": config.context_length, "n_embd": config.emb_dim, "n_head": config.n_heads}
        sizes |= {"n_layer": config.n_layers, "vocab_size": config.vocab_size}
        given = GPT2Config(**sizes, tie_word_embeddings=config.tie_weights, **drop)
        net = GPT2LMHeadModel(given)
        return net, lambda tokens: net(tokens).logits
    from litgpt import GPT, Config  # has no GPT-2: its layers for GPT-NeoX in GPT-2's sizes, without dropout

    net = GPT(
        Config(
            block_size=config.context_length,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_embd=config.emb_dim,
            norm_class_name="LayerNorm",
            mlp_class_name="GptNeoxMLP",
            gelu_approximate="tanh",
            parallel_residual=False,
        )
    )
    return net, net
