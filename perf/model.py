"""Random models and batches of the sizes that perf/bench.py measures."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, ModelPass, Params
from vlmrlaif_jax.data.processors.llava import count_pooled_tokens
from vlmrlaif_jax.models import clip, projector, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.planner import flops

BASES = ("none", "nf4", "int8")  # Storage of the frozen kernels.
# Default attention of each of JAX's backends.
ATTENTION = {"cpu": "chunked", "gpu": "cudnn", "tpu": "splash"}


class Size(NamedTuple):
  """A model's shape and its work."""

  llm: Mapping[str, int]  # Fields of llama.Model.
  vision: Mapping[str, int]  # Fields of the tower, which does not run.
  dtype: str  # Type of weights and computation; LoRA factors are float32.
  remat: str  # A key of decoder.REMAT.
  frames: int  # Frames per video.
  question: int  # Text tokens of a prompt, after its video tokens.
  new: int  # Tokens of a response.
  rows: int  # Responses of an SFT step, pairs of DPO, prompts of sampling.
  prompts: int  # Prompts of a GRPO or PPO step.
  group: int  # Responses to each of those prompts.


SIZES = {
  "tiny": Size(
    llm=llama.VARIANTS["3m"],
    vision=clip.VARIANTS["tiny"],
    dtype="float32",
    remat="none",
    frames=12,
    question=36,
    new=64,
    rows=8,
    prompts=2,
    group=8,
  ),
  "110m": Size(
    llm=llama.VARIANTS["110m"],
    vision=dict(image=56, patch=14, embed=1024, mlp=1024, layers=1, heads=16),
    dtype="float32",
    remat="none",
    frames=8,
    question=104,
    new=64,
    rows=4,
    prompts=1,
    group=8,
  ),
  "7b": Size(
    llm=llama.VARIANTS["7b"],
    vision=clip.VARIANTS["l14_336"],
    dtype="bfloat16",
    remat="full",
    frames=50,
    question=142,
    new=256,
    rows=8,
    prompts=4,
    group=5,
  ),
}


class Bench(NamedTuple):
  """A size to measure, with its settings."""

  name: str  # Name of the size.
  size: Size
  base: str  # One of BASES.
  rank: int  # LoRA rank.
  attention: str  # A backend of models/ops/attention.py; "" selects the device's.
  scratch: Path  # Folder of the checkpoint to load, and of peers' logs.


def select_attention(bench: Bench) -> str:
  """Returns the attention backend."""
  return bench.attention or ATTENTION[jax.default_backend()]


def make_model(bench: Bench) -> vlm.VLM:
  """Returns the model of a size, without weights."""
  types = dict(dtype=bench.size.dtype, param_dtype=bench.size.dtype)
  llm = llama.Model(
    **bench.size.llm,
    rank=bench.rank,
    alpha=2.0 * bench.rank,
    attention=select_attention(bench),
    remat=bench.size.remat,
    unstack=jax.default_backend() == "cpu",  # As loading.configure_model sets it.
    **types,
  )
  tower = clip.VisionTower(**bench.size.vision, **types)
  return vlm.VLM(tower, projector.Projector(llm.embed, **types), llm)


def count_patches(size: Size) -> int:
  """Counts the patches of a frame."""
  return (size.vision["image"] // size.vision["patch"]) ** 2


def get_prompt_len(size: Size) -> int:
  """Returns the tokens of a prompt, with its video tokens."""
  return count_pooled_tokens(size.frames, count_patches(size)) + size.question


def make_batch(
  size: Size, rows: int, *, new: int, video: bool = True, seed: int = 0
) -> Batch:
  """Creates a batch without padding: prompts of one length, responses of another.

  Args:
    size: The size of prompts and videos.
    rows: Rows of the batch.
    new: Tokens of a response; 0 for prompts only.
    video: False replaces video tokens by text, as in a peer without video.
    seed: Seed of the tokens and features.
  """
  rng, patches, start = (
    np.random.default_rng(seed),
    count_patches(size),
    get_prompt_len(size),
  )
  tokens = rng.integers(1, size.llm["vocab"], (rows, start + new), np.int32)
  shape = (rows, size.frames, patches, size.vision["embed"])
  if video:
    tokens[:, : start - size.question] = VIDEO_TOKEN
  else:
    shape = (rows, 1, 1, size.vision["embed"])
  features = rng.standard_normal(shape, np.float32).astype(np.float16)
  mask = np.ones(tokens.shape, bool)
  answer = mask & (np.arange(start + new) >= start)
  positions = np.tile(np.arange(start + new, dtype=np.int32)[:, None], (rows, 1, 1))
  return jax.device_put(Batch(features, tokens, mask, answer, positions))


def make_pass(
  model: vlm.VLM, size: Size, prompts: int, responses: int = 1
) -> ModelPass:
  """Returns a training pass over prompts; a prompt's responses share it."""
  start = get_prompt_len(size)
  return ModelPass(
    "train",
    "policy",
    model,
    prompts,
    start + size.new,
    frames=size.frames,
    start=start,
    group=responses,
  )


def count_forward_flops(model_pass: ModelPass) -> int:
  """Counts the FLOPs of a forward pass, LoRA included."""
  return sum(flops.count_forward_flops(model_pass))


def count_training_flops(model_pass: ModelPass) -> int:
  """Counts the FLOPs of a forward pass and the gradient of the LoRA factors."""
  return flops.count_training_flops(flops.count_forward_flops(model_pass))


def count_decode_bytes(shapes: Params, model: vlm.VLM, size: Size, rows: int) -> int:
  """Counts the bytes that a decoding step reads.

  They are the language model's weights and the filled part of the cache. The embedding
  does not count, because a step reads few of its rows.

  Args:
    shapes: Shapes of all variables, "lora" included.
    model: The model.
    size: The size of prompts and responses.
    rows: Rows that are decoded together.
  """
  llm = {name: tree["llm"] for name, tree in shapes.items()}
  count_bytes = lambda leaf: leaf.size * leaf.dtype.itemsize
  embedding = shapes["params"]["llm"]["embed"]["embedding"]
  weights = sum(map(count_bytes, jax.tree.leaves(llm))) - count_bytes(embedding)
  row = 2 * model.llm.layers * flops.get_model_sizes(model).kv_width
  filled = get_prompt_len(size) + size.new / 2
  return weights + int(rows * filled * row) * jnp.dtype(size.dtype).itemsize


def get_shapes(model: vlm.VLM, base: str) -> Params:
  """Returns the shapes and dtypes of a model's frozen variables."""
  params = vlm.get_param_shapes(model)
  if base == "none":
    return {"params": params}
  quantize = functools.partial(
    quantization.quantize_params, paths=llama.QUANTIZED, scheme=base
  )
  return jax.eval_shape(quantize, params)
