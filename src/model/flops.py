"""Operations per token of a model, and the peak rates of devices."""

from src.model.config import GPTConfig

FORMULA = "6 * N + 12 * n_layers * emb_dim * context_length, N: the weights that multiply (blocks and head)"

# Dense bfloat16 operations per second, accumulated in float32, from NVIDIA's data sheets; the first match counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def multiplying_parameters(config: GPTConfig) -> int:
    """The number of weights in matrix products, without embeddings, biases and norms."""
    return 12 * config.n_layers * config.emb_dim**2 + config.vocab_size * config.emb_dim


def flops_per_token(config: GPTConfig, context_length: int) -> int:
    """Operations of a forward and a backward pass per token, in windows of ``context_length`` (Chowdhery et al. 2022,
    appendix B; attention is counted as if it were not causal)."""
    attention = 12 * config.n_layers * config.emb_dim * context_length
    return 6 * multiplying_parameters(config) + attention


def peak_flops(device_name: str) -> float | None:
    """The bfloat16 peak of a device by its data sheet, in operations per second; None if it is not in ``PEAKS``."""
    words = device_name.replace("-", " ").split()
    if "Laptop" in words:  # half as fast under the same name
        return None
    return next((peak for name, peak in PEAKS.items() if all(word in words for word in name.split())), None)
