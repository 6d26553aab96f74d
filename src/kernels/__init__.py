"""Faster equals of the model's plain operations."""
