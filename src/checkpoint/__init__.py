"""Checkpoints: written whole or not at all, sealed with their SHA-256, read safely, and continued exactly."""
