"""What a step has to compute and to read, counted from the shapes of the model.

A multiplication and an addition are two FLOPs; what is not a matmul is none.
"""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from vlmrlaif_jax import convert
from vlmrlaif_jax.bench_model import Size, patches_of, prompt_len
from vlmrlaif_jax.models import lora, vlm
from vlmrlaif_jax.types import Params


class Pass(NamedTuple):
  """What goes through the model once."""

  tokens: int  # Through the layers,
  pairs: int  # of which so many look at one another, themselves included.
  logits: int  # Positions that need them.
  patches: int  # Through the projector.


def whole(size: Size, rows: int) -> Pass:
  """Prompts with an answer each."""
  return grouped(size, rows, 1)


def grouped(size: Size, prompts: int, answers: int) -> Pass:
  """Prompts with some answers each, which all look at the one prompt.

  That is what has to be computed, and not what is by those who forward a prompt again
  for each of its answers.
  """
  start, rows = prompt_len(size), prompts * answers
  return Pass(
    tokens=prompts * start + rows * size.new,
    pairs=prompts * _causal(start) + rows * (size.new * start + _causal(size.new)),
    logits=rows * size.new,
    patches=prompts * size.frames * patches_of(size),
  )


def _causal(time: int) -> int:
  return time * (time + 1) // 2


class _Parts(NamedTuple):
  """FLOPs of a forward pass."""

  layers: int  # Frozen kernels,
  factors: int  # those of LoRA,
  logits: int
  attention: int
  projector: int


def _forward(model: vlm.VLM, work: Pass) -> _Parts:
  llm = model.llm
  shapes = convert.param_shapes(model)["llm"]["blocks"]
  flat = flax.traverse_util.flatten_dict(shapes, sep="/")
  kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
  inputs_and_outputs = sum(sum(leaf.shape[1:]) for leaf in kernels.values())
  width = llm.heads * (llm.head_dim or llm.embed // llm.heads)
  return _Parts(
    layers=2 * work.tokens * lora.count(kernels),
    factors=2 * work.tokens * llm.layers * llm.rank * inputs_and_outputs,
    logits=2 * work.logits * llm.embed * llm.vocab,
    attention=4 * work.pairs * llm.layers * width,
    projector=2 * work.patches * (model.vision.embed + llm.embed) * llm.embed,
  )


def forward_flops(model: vlm.VLM, work: Pass) -> int:
  """Of one forward pass, LoRA included."""
  return sum(_forward(model, work))


def training_flops(model: vlm.VLM, work: Pass) -> int:
  """Of a forward pass and the gradient of the factors of LoRA.

  A frozen kernel takes as much again for the gradient of its input; a factor, and each
  product of attention, has two gradients. The projector has none.
  """
  parts = _forward(model, work)
  twice = parts.layers + parts.logits
  return 2 * twice + 3 * (parts.factors + parts.attention) + parts.projector


def decode_bytes(shapes: Params, model: vlm.VLM, size: Size, rows: int) -> int:
  """What a step of decoding reads: all of the language model's weights but the rows of
  the embedding that are not looked up, and the filled part of the cache.

  Args:
    shapes: of all variables, "lora" included.
    rows: that are decoded together.
  """
  llm = {name: tree["llm"] for name, tree in shapes.items()}
  of = lambda leaf: leaf.size * leaf.dtype.itemsize
  embedding = shapes["params"]["llm"]["embed"]["embedding"]
  weights = sum(map(of, jax.tree.leaves(llm))) - of(embedding)
  head_dim = model.llm.head_dim or model.llm.embed // model.llm.heads
  row = 2 * model.llm.layers * model.llm.kv_heads * head_dim
  filled = prompt_len(size) + size.new / 2
  return weights + int(rows * filled * row) * jnp.dtype(size.dtype).itemsize
