"""Registers `lmms_model` with lmms-eval, which reads MODEL as an entry point.

This module imports no JAX, because lmms-eval loads all plug-ins when it starts.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MODEL = ModelManifest(
  "vlmrlaif_jax", simple_class_path="vlmrlaif_jax.serving.lmms_model.VlmRlaif"
)
