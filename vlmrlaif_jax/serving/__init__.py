"""Trained weights in use: export, model card and chat."""
