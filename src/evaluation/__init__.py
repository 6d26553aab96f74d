"""How good a model is, on texts and on tasks, in plain PyTorch."""
