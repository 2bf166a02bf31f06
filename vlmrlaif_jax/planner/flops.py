"""What a pass of a model has to compute, counted from its shapes.

A multiplication and an addition are two FLOPs; what is not a matmul is none.
"""

import functools
from typing import NamedTuple

import flax
import jax.numpy as jnp

from vlmrlaif_jax.core.types import ModelPass
from vlmrlaif_jax.models import lora, vlm


def count_causal_pairs(time: int) -> int:
  """Pairs of tokens, of which each looks at itself and at those before it."""
  return time * (time + 1) // 2


class ModelSizes(NamedTuple):
  """Of a model, as far as what it computes depends on them."""

  kernels: int  # Weights of all layers' matrices,
  ends: int  # and the sum of their inputs and outputs.
  width: int  # Of all query heads,
  kv_width: int  # and of those of keys, or of values.
  dtype: int  # Bytes of a number.


@functools.lru_cache
def get_model_sizes(model: vlm.VLM) -> ModelSizes:
  blocks = vlm.get_param_shapes(model)["llm"]["blocks"]
  flat = flax.traverse_util.flatten_dict(blocks, sep="/")
  kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
  llm = model.llm
  head_dim = llm.head_dim or llm.embed // llm.heads
  return ModelSizes(
    kernels=lora.count_params(kernels),
    ends=sum(sum(leaf.shape[1:]) for leaf in kernels.values()),
    width=llm.heads * head_dim,
    kv_width=llm.kv_heads * head_dim,
    dtype=jnp.dtype(llm.dtype).itemsize,
  )


class FlopCounts(NamedTuple):
  """Of a forward pass, by what they are for."""

  layers: int  # Frozen kernels,
  factors: int  # those of LoRA,
  logits: int
  attention: int
  projector: int


def count_forward_flops(of: ModelPass) -> FlopCounts:
  """Of one forward pass, LoRA included; a group's responses look at the one prompt.

  That is what has to be computed, and not what is by those who forward a prompt again
  for each of its responses.
  """
  llm, size, vision = of.model.llm, get_model_sizes(of.model), of.model.vision
  rows, new = of.rows * of.group, of.time - of.start
  tokens = of.rows * of.start + rows * new
  pairs = of.rows * count_causal_pairs(of.start) + rows * (
    new * of.start + count_causal_pairs(new)
  )
  patches = of.rows * of.frames * vision.patch_count
  return FlopCounts(
    layers=2 * tokens * size.kernels,
    factors=2 * tokens * llm.layers * llm.rank * size.ends,
    logits=2 * rows * new * of.logits * llm.embed * llm.vocab,
    attention=4 * pairs * llm.layers * size.width,
    projector=2 * patches * (vision.embed + llm.embed) * llm.embed,
  )


def count_training_flops(parts: FlopCounts) -> int:
  """Of a forward pass and the gradient of the factors of LoRA.

  A frozen kernel takes as much again for the gradient of its input; a factor, and each
  product of attention, has two gradients. The projector has none.
  """
  twice = parts.layers + parts.logits
  return 2 * twice + 3 * (parts.factors + parts.attention) + parts.projector
