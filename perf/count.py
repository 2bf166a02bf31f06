"""What a step has to compute and to read, counted from the shapes of the model.

A multiplication and an addition are two FLOPs; what is not a matmul is none.
"""

import jax
import jax.numpy as jnp

from perf.model import Size, patches_of, prompt_len
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.planner import flops
from vlmrlaif_jax.planner.flops import Pass


def whole(size: Size, rows: int) -> Pass:
  """Prompts with an answer each."""
  return grouped(size, rows, 1)


def grouped(size: Size, prompts: int, answers: int) -> Pass:
  """Prompts with some answers each, which all look at the one prompt."""
  return flops.grouped(
    prompts,
    answers,
    start=prompt_len(size),
    new=size.new,
    patches=size.frames * patches_of(size),
  )


def forward_flops(model: vlm.VLM, work: Pass) -> int:
  """Of one forward pass, LoRA included."""
  return sum(flops.forward(model, work))


def training_flops(model: vlm.VLM, work: Pass) -> int:
  """Of a forward pass and the gradient of the factors of LoRA."""
  return flops.training(flops.forward(model, work))


def decode_bytes(shapes: Params, model: vlm.VLM, size: Size, rows: int) -> int:
  """Returns the bytes that a step of decoding reads: weights and the filled cache.

  Of the embedding, only the rows that are looked up count.

  Args:
    shapes: of all variables, "lora" included.
    model: whose language model decodes.
    size: of the prompts, and how many tokens are sampled.
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
