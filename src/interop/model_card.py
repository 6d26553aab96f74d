"""The page that the Hugging Face hub shows of a model."""

import json
import math
from typing import Any

from src.checkpoint.storage import printable
from src.interop.names import empty_model
from src.model.config import GPTConfig


def model_card(config: GPTConfig, run: dict[str, Any], record: dict[str, Any], name: str) -> str:
    """A model card in the hub's format: what the model is, how it was trained, how to use it.

    ``run`` is what the checkpoint records: its step, tokens and losses. ``record`` is the ``run.json`` of the run that
    wrote it, which may have continued since.
    """
    parameters = sum(parameter.numel() for parameter in empty_model(config).parameters())
    shape = {
        "parameters": f"{parameters:,}",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "context": f"{config.context_length:,} tokens",
        "width, heads, layers": f"{config.emb_dim}, {config.n_heads}, {config.n_layers}",
        "bias in query, key, value": "yes" if config.qkv_bias else "no (zeros in the file)",
        "head tied to the embedding": "yes" if config.tie_weights else "no",
    }
    given = run.get("metrics"), record.get("versions")
    metrics, versions = (value if isinstance(value, dict) else {} for value in given)
    val_loss = metrics.get("val/loss")
    trained = {
        "command": record.get("command"),
        "optimizer steps": run.get("step"),
        "tokens seen": run.get("tokens_seen"),
        "train loss": metrics.get("train/eval_loss"),
        "val loss": val_loss,
        "val perplexity": math.exp(min(val_loss, 700)) if isinstance(val_loss, float) else None,
        "data sha256": run.get("data_sha256"),
        "precision": run.get("precision"),
        "device": record.get("device"),
        "git": record.get("git"),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
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
    if run or record:
        lines += ["", "## How it was trained", "", "| | |", "|---|---|"]
        lines += [f"| {key} | `{printable(value)}` |" for key, value in trained.items() if value not in (None, "")]
        lines += ["", "```json", json.dumps(record.get("config", {}), indent=2), "```"]
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
