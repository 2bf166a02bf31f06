"""Counts the FLOPs of a model pass from its shapes.

A multiplication and an addition are two FLOPs. Only matmuls count.
"""

import functools
import math
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from vlmrlaif_jax.core.types import ModelPass, Params
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
  projector: int  # Weights of the projector's matrices.
  taps: int  # Layers to which features are added.
  dtype: int  # Bytes of a number.


@functools.lru_cache
def get_model_sizes(model: vlm.VLM) -> ModelSizes:
  """Returns the sizes of a model, which are cached."""
  params = vlm.get_param_shapes(model)
  kernels = _select_kernels(params["llm"]["blocks"])
  feature = jax.ShapeDtypeStruct((1, 1, *model.vision.feature_shape), jnp.float16)
  connect = lambda params, x: model.bind({"params": params}).projector.connect(x)
  added = jax.eval_shape(connect, params, feature).deepstack
  llm = model.llm
  head_dim = llm.head_dim or llm.embed // llm.heads
  return ModelSizes(
    kernels=lora.count_params(kernels),
    ends=sum(sum(leaf.shape[1:]) for leaf in kernels.values()),
    width=llm.heads * head_dim,
    kv_width=llm.kv_heads * head_dim,
    projector=lora.count_params(_select_kernels(params.get("projector", {}))),
    taps=0 if added is None else len(added),
    dtype=jnp.dtype(llm.dtype).itemsize,
  )


def _select_kernels(params: Params) -> Params:
  """Returns the matrices of a tree by their paths."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return {path: leaf for path, leaf in flat.items() if path.endswith("kernel")}


def count_row_features(model_pass: ModelPass) -> int:
  """Counts the features of a row that the projector reads."""
  return model_pass.frames * math.prod(model_pass.model.vision.feature_shape[:-1])


class FlopCounts(NamedTuple):
  """FLOPs of a forward pass by part of the model."""

  layers: int  # Frozen kernels of the language model's layers.
  factors: int  # LoRA factors.
  logits: int  # LM head.
  attention: int  # Queries times keys, and weights times values.
  projector: int  # Projector, on every feature.


def count_forward_flops(model_pass: ModelPass) -> FlopCounts:
  """Counts the FLOPs of a forward pass, LoRA included.

  A group's prompt counts once, even for a backend that computes it per response.
  """
  model, prompts, start = model_pass.model, model_pass.rows, model_pass.start
  llm, size = model.llm, get_model_sizes(model)
  rows, new = prompts * model_pass.group, model_pass.time - start
  tokens = prompts * start + rows * new
  pairs = prompts * count_causal_pairs(start)
  pairs += rows * (new * start + count_causal_pairs(new))
  return FlopCounts(
    layers=2 * tokens * size.kernels,
    factors=2 * tokens * llm.layers * llm.rank * size.ends,
    logits=2 * rows * new * model_pass.logits * llm.embed * llm.vocab,
    attention=4 * pairs * llm.layers * size.width,
    projector=2 * prompts * count_row_features(model_pass) * size.projector,
  )


def count_training_flops(parts: FlopCounts) -> int:
  """Counts the FLOPs of a forward pass and the gradient of the LoRA factors.

  A frozen kernel has one gradient, of its input. A factor and a product of attention
  have two. The projector has none.
  """
  twice = parts.layers + parts.logits
  return 2 * twice + 3 * (parts.factors + parts.attention) + parts.projector
