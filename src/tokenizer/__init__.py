"""Text to token ids and back, and which tokenizer does it."""

from src.tokenizer.encoding import (
    END_OF_TEXT,
    encode,
    fingerprint,
    gpt2_tokenizer,
    text_to_token_ids,
    token_byte_counts,
    token_bytes,
    token_dtype,
    token_ids_to_text,
)
from src.tokenizer.pieces import separable

__all__ = [
    "END_OF_TEXT",
    "encode",
    "fingerprint",
    "gpt2_tokenizer",
    "separable",
    "text_to_token_ids",
    "token_byte_counts",
    "token_bytes",
    "token_dtype",
    "token_ids_to_text",
]
