"""GPT-2 in plain PyTorch."""
