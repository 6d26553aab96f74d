"""Watching a run: metrics, samples, plots, progress, checkpoints. Nothing here changes what is trained."""
