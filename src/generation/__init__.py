"""Text from a trained model, in plain PyTorch."""
