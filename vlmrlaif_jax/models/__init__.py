"""Flax modules: vision towers, projectors and decoders, one file per family."""
