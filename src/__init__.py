"""Pre-training of GPT-2-family language models with PyTorch Lightning."""
