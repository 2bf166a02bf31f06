"""Reads and writes published checkpoints: layouts, tensor files and PEFT adapters."""
