"""One optimizer step after another, on PyTorch Lightning."""
