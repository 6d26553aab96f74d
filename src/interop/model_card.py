"""What the Hugging Face hub shows of a model."""

import json
from typing import Any

from src.model.config import GPTConfig

SHOWN = ("command", "parameters", "optimizer_steps", "tokens_seen", "train_loss", "val_loss", "val_perplexity",
         "data_sha256", "precision", "device", "seconds", "git")  # fmt: skip


def model_card(config: GPTConfig, record: dict[str, Any], name: str) -> str:
    """A model card in the hub's form: what the model is, how it came about, how to use it."""
    shape = {
        "vocabulary": f"{config.vocab_size:,} tokens",
        "context": f"{config.context_length:,} tokens",
        "width, heads, layers": f"{config.emb_dim}, {config.n_heads}, {config.n_layers}",
        "bias in query, key, value": "yes" if config.qkv_bias else "no (zeros in the file)",
        "head tied to the embedding": "yes" if config.tie_weights else "no",
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- gpt2",
        "---",
        "",
        f"# {name}",
        "",
    ]
    lines += ["A GPT-2 language model, exported by gpt2-lightning.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in shape.items()]
    if record:
        lines += ["", "## How it was trained", "", "| | |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | `{record[key]}` |" for key in SHOWN if record.get(key) is not None]
        versions = record.get("versions")
        versions = versions.items() if isinstance(versions, dict) else ()
        versions = ", ".join(f"{package} {version}" for package, version in versions)
        lines += [f"| versions | {versions} |", "", "```json", json.dumps(record.get("config", {}), indent=2), "```"]
    lines += [
        "",
        "## How to use it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        'tokens = tokenizer("Every effort moves you", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))",
        "```",
        "",
    ]
    return "\n".join(lines)
