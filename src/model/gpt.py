"""GPT-2 (Radford et al. 2019): tokens in, logits out."""

import math

import torch
from torch import Tensor, nn

from src.model.block import Block
from src.model.cache import KVCache
from src.model.config import GPTConfig


class GPT(nn.Module):
    """A decoder-only transformer with learned positions, pre-norm blocks and an optionally tied head.

    Letters in shape comments: B batch, T time (tokens), C embedding, H heads, D head size, V vocabulary.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.vocab_size, "the size of the tokenizer is not known yet"
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # shapes only: every number is drawn once, by init_weights
            self.tok_emb = _embedding(config.vocab_size, config.emb_dim)
            self.pos_emb = _embedding(config.context_length, config.emb_dim)
            self.dropout = nn.Dropout(config.drop_rate)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.final_norm = nn.LayerNorm(config.emb_dim)
            self.head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        self.to_empty(device=device)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        if device.type != "meta":  # on which a model is made whose weights are read from a file
            self.init_weights()

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits ``(B, T, V)`` of the token after each of ``tokens`` ``(B, T)``, int64.

        With a ``cache``, ``tokens`` continue the positions it holds and are appended to it.

        Raises:
            ValueError: more positions than ``context_length``.
        """
        return self.head(self.hidden_states(tokens, cache))  # (B, T, V)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head, ``(B, T, C)``; takes and raises what :meth:`forward` does."""
        T, device = tokens.shape[1], tokens.device
        length = T if cache is None else cache.length + T
        if length > self.config.context_length:
            raise ValueError(
                f"model.context_length={self.config.context_length} is too short for {length} tokens; "
                f"use a shorter input or model.context_length={length}"
            )
        positions = torch.arange(T, device=device) if cache is None else cache.positions(T, device)  # (T,) or (B, T)
        x = self.dropout(self.tok_emb(tokens) + self.pos_emb(positions))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)  # (B, T, C)
        if cache is not None:
            cache.advance(T)
        return self.final_norm(x)  # (B, T, C)

    @torch.no_grad()
    def init_weights(self, part: nn.Module | None = None) -> None:
        """Draw every parameter, or those of ``part`` only, anew, in the order of the forward pass.

        ==========================  =======================================  ==============================
        parameter                   ``init=gpt2``                            ``init=torch``
        ==========================  =======================================  ==============================
        embeddings                  N(0, 0.02)                               N(0, 1)
        qkv, up_proj, head          N(0, 0.02)                               U(-1/sqrt(fan_in), 1/sqrt(fan_in))
        out_proj, down_proj         N(0, 0.02 / sqrt(2 * n_layers))          U(-1/sqrt(fan_in), 1/sqrt(fan_in))
        biases of linear layers     0                                        U(-1/sqrt(fan_in), 1/sqrt(fan_in))
        layer norms                 scale 1, shift 0                         scale 1, shift 0
        ==========================  =======================================  ==============================
        """
        tied, drawn = self.config.tie_weights, set((self if part is None else part).modules())
        for name, module in self.named_modules():
            if module not in drawn:
                continue
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding | nn.Linear) and not (tied and module is self.head):
                if self.config.init == "torch":
                    parts = 3 if name.endswith("qkv") else 1  # the book draws query, key and value one by one
                    _draw_torch(module, parts)
                else:
                    residual = name.endswith(("out_proj", "down_proj"))
                    std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                    nn.init.normal_(module.weight, std=std)
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        nn.init.zeros_(module.bias)


def _embedding(rows: int, columns: int) -> nn.Embedding:
    # nn.Embedding's constructor would draw; on the meta device that imports PyTorch's compiler, which takes a second.
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)


def _draw_torch(module: nn.Embedding | nn.Linear, parts: int) -> None:
    """PyTorch's default draw for a layer that stacks ``parts`` layers along its output rows."""
    if isinstance(module, nn.Embedding):
        module.reset_parameters()
        return
    bound = 1 / math.sqrt(module.in_features)
    biases = [None] * parts if module.bias is None else module.bias.chunk(parts)
    for weight, bias in zip(module.weight.chunk(parts), biases, strict=True):
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            nn.init.uniform_(bias, -bound, bound)
