"""Shapes of a model's parameters without allocating them."""

import functools

import jax
import jax.numpy as jnp

from vlmrlaif_jax.core.types import Batch, Params
from vlmrlaif_jax.models.vlm import VLM


def param_shapes(model: VLM) -> Params:
  """Shapes and dtypes of a VLM's "params"; computes nothing."""
  return variable_shapes(model)["params"]


@functools.lru_cache
def variable_shapes(model: VLM) -> Params:
  """The same of all that Model.init makes, "lora" and a head included."""
  # Kernels would ask for a row on each shard of the mesh.
  model = model.clone(llm=model.llm.clone(attention="xla"))
  size = model.vision.image
  tokens = jnp.zeros((1, 1), int)
  batch = Batch(jnp.zeros((1, 1, size, size, 3)), tokens, tokens == 0, tokens == 0)
  return jax.eval_shape(model.init, jax.random.key(0), batch)
