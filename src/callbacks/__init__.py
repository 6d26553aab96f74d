"""Callbacks and loggers that watch a run. None of them changes what is trained."""
