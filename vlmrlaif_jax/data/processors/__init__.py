"""Processors: how each model family reads images and videos, on the host."""
