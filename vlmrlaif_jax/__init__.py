"""Aligns video-language models with AI feedback, in JAX."""

__version__ = "0.1.0"
