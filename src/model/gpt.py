"""GPT-2 (Radford et al. 2019): tokens in, logits out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.model.block import Block
from src.model.cache import KVCache
from src.model.config import GPTConfig
from src.model.dropout import Dropout
from src.model.linear import Linear


class GPT(nn.Module):
    """A decoder-only transformer with learned positions, pre-norm blocks and an optionally tied head.

    Letters used in shape comments: B batch, T time (tokens), C embedding, H heads, D head size, V vocabulary.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # in training: compute them again instead of keeping them
        self._compiled: Callable[[Tensor], Tensor] | None = None
        device = torch.get_default_device()
        with torch.device("meta"):  # shapes only: the one draw of random numbers is init_weights
            # nn.Embedding would draw, and a normal draw on this device imports PyTorch's compiler: a second
            embeddings = (torch.empty(rows, config.emb_dim) for rows in (config.vocab_size, config.context_length))
            self.tok_emb, self.pos_emb = (nn.Embedding.from_pretrained(weight, freeze=False) for weight in embeddings)
            self.dropout = Dropout(config.drop_rate)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.final_norm = nn.LayerNorm(config.emb_dim)
            self.head = Linear(config.emb_dim, config.vocab_size, bias=False)
        self.to_empty(device=device)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        if device.type != "meta":  # whose weights come later
            self.init_weights()

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits ``(B, T, vocab_size)`` of the token after each of ``tokens`` ``(B, T)``, int64.

        With a ``cache``, ``tokens`` continue the positions it holds and are appended to it.

        Raises:
            ValueError: more positions than ``context_length``.
        """
        return self.head(self.hidden_states(tokens, cache))  # (B, T, V)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head makes logits of, ``(B, T, C)``; see :meth:`forward`."""
        T = tokens.shape[1]
        start = 0 if cache is None else cache.length
        if start + T > self.config.context_length:
            raise ValueError(
                f"{start + T} tokens do not fit model.context_length={self.config.context_length}: "
                f"shorten the input or use a model with model.context_length={start + T}"
            )
        if self._compiled is not None and torch.is_grad_enabled() and cache is None:
            return self._compiled(tokens)
        return self._hidden_states(tokens, cache)

    def _hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        T, device = tokens.shape[1], tokens.device
        positions = torch.arange(T, device=device) if cache is None else cache.positions(T, device)  # (T,) or (B, T)
        x = self.dropout(self.tok_emb(tokens) + self.pos_emb(positions))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False)  # (B, T, C); dropout draws the same again
            else:
                x = block(x, cache, layer)  # (B, T, C)
        if cache is not None:
            cache.advance(T)
        return self.final_norm(x)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward pass of training, in place and by ``torch.compile``: names of parameters stay. Evaluation
        and decoding, whose shapes change, are not compiled."""
        self._compiled = torch.compile(self._hidden_states, *args, **kwargs)

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    def pack(self) -> None:
        """Put the weights into the order that decoding on a CPU reads fastest; the model can then only decode."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew, in the order of the forward pass.

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
        tied = self.config.tie_weights
        for name, module in self.named_modules():
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
                    if getattr(module, "bias", None) is not None:
                        nn.init.zeros_(module.bias)


def _draw_torch(module: nn.Embedding | nn.Linear, parts: int) -> None:
    """PyTorch's default draw for a layer made of ``parts`` layers stacked by output row."""
    if isinstance(module, nn.Embedding):
        module.reset_parameters()
        return
    bound = 1 / math.sqrt(module.in_features)
    biases = [None] * parts if module.bias is None else module.bias.chunk(parts)
    for weight, bias in zip(module.weight.chunk(parts), biases, strict=True):
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            nn.init.uniform_(bias, -bound, bound)
