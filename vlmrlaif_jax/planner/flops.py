"""Counts the FLOPs of a model pass from its shapes.

A multiplication and an addition are two FLOPs. Only matmuls count.
"""

import functools
from typing import NamedTuple

import flax
import jax.numpy as jnp

from vlmrlaif_jax.core.types import ModelPass
from vlmrlaif_jax.models import lora, vlm


def count_causal_pairs(time: int) -> int:
  """Counts the pairs of a query and a key that causal attention allows."""
  return time * (time + 1) // 2


class ModelSizes(NamedTuple):
  """The numbers of a model that its FLOPs and bytes depend on."""

  kernels: int  # Weights of all layers' matrices.
  ends: int  # Sum of all layers' matrices' input and output widths.
  width: int  # Channels of all query heads.
  kv_width: int  # Channels of all key heads, and as many of value heads.
  dtype: int  # Bytes of a number.


@functools.lru_cache
def get_model_sizes(model: vlm.VLM) -> ModelSizes:
  """Returns the sizes of a model, which are cached."""
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
  """FLOPs of a forward pass by part of the model."""

  layers: int  # Frozen kernels of the language model's layers.
  factors: int  # LoRA factors.
  logits: int  # LM head.
  attention: int  # Queries times keys, and weights times values.
  projector: int  # Projector, on every patch.


def count_forward_flops(model_pass: ModelPass) -> FlopCounts:
  """Counts the FLOPs of a forward pass, LoRA included.

  A group's prompt counts once, even for a backend that computes it per response.
  """
  model, prompts, start = model_pass.model, model_pass.rows, model_pass.start
  llm, size, vision = model.llm, get_model_sizes(model), model.vision
  rows, new = prompts * model_pass.group, model_pass.time - start
  tokens = prompts * start + rows * new
  pairs = prompts * count_causal_pairs(start)
  pairs += rows * (new * start + count_causal_pairs(new))
  patches = prompts * model_pass.frames * vision.patch_count
  return FlopCounts(
    layers=2 * tokens * size.kernels,
    factors=2 * tokens * llm.layers * llm.rank * size.ends,
    logits=2 * rows * new * model_pass.logits * llm.embed * llm.vocab,
    attention=4 * pairs * llm.layers * size.width,
    projector=2 * patches * (vision.channels + llm.embed) * llm.embed,
  )


def count_training_flops(parts: FlopCounts) -> int:
  """Counts the FLOPs of a forward pass and the gradient of the LoRA factors.

  A frozen kernel has one gradient, of its input. A factor and a product of attention
  have two. The projector has none.
  """
  twice = parts.layers + parts.logits
  return 2 * twice + 3 * (parts.factors + parts.attention) + parts.projector
