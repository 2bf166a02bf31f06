"""Registers `lmms_model` with lmms-eval, which reads MODEL as an entry point.

It imports no JAX: lmms-eval loads every plug-in whenever it starts.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MODEL = ModelManifest(
  "vlmrlaif_jax", simple_class_path="vlmrlaif_jax.serving.lmms_model.VlmRlaif"
)
