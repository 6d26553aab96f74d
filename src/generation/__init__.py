"""Text out of a trained model, in plain PyTorch."""
