"""A model of random weights and the work that perf/bench.py gives it."""

import functools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, Params
from vlmrlaif_jax.models import clip, llama, projector, vlm
from vlmrlaif_jax.models import shapes as shapes_lib
from vlmrlaif_jax.models.ops import quantization

BASES = ("none", "nf4", "int8")  # What the frozen kernels are held in.
# The attention of each of JAX's backends, unless another is asked for.
ATTENTION = {"cpu": "chunked", "gpu": "cudnn", "tpu": "splash"}
# What leaves are filled with; kernels, quantised or not, then have a deviation of 0.02.
_FILL = {"scale": 1.0, "block_scale": 0.04, "channel_scale": 2.7e-4}


class Size(NamedTuple):
  """A model's shape, and how much it is given to do."""

  llm: Mapping[str, int]  # Fields of llama.Model.
  vision: Mapping[str, int]  # Of the tower, which does not run: videos are features.
  dtype: str  # Of weights and computation; the factors of LoRA are in float32.
  remat: str  # See decoder.REMAT.
  frames: int  # Of each video.
  question: int  # Text tokens of each prompt, after its video tokens.
  new: int  # Tokens of each answer.
  rows: int  # Answers of a step of SFT, pairs of DPO, prompts of sampling.
  prompts: int  # Of a step of GRPO or PPO,
  group: int  # and the answers to each of them.


SIZES = {
  "tiny": Size(
    llm=dict(vocab=2048, embed=256, mlp=704, layers=2, heads=8, kv_heads=8),
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
  "100m": Size(
    llm=dict(vocab=16_384, embed=768, mlp=2048, layers=12, heads=12, kv_heads=12),
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
  """What is to be measured."""

  name: str  # Of the size.
  size: Size
  base: str  # One of BASES.
  rank: int  # Of the LoRA update.
  attention: str  # Of models/ops/attention.py; "": the backend's own.
  scratch: Path  # Gets the checkpoint that is loaded, and what peers print.


def attention_of(bench: Bench) -> str:
  return bench.attention or ATTENTION[jax.default_backend()]


def model_of(bench: Bench) -> vlm.VLM:
  types = dict(dtype=bench.size.dtype, param_dtype=bench.size.dtype)
  llm = llama.Model(
    **bench.size.llm,
    rank=bench.rank,
    alpha=2.0 * bench.rank,
    attention=attention_of(bench),
    remat=bench.size.remat,
    unstack=jax.default_backend() == "cpu",  # As build.load.
    **types,
  )
  tower = clip.VisionTower(**bench.size.vision, **types)
  return vlm.VLM(tower, projector.Projector(llm.embed, **types), llm)


def patches_of(size: Size) -> int:
  """Of a frame."""
  return (size.vision["image"] // size.vision["patch"]) ** 2


def prompt_len(size: Size) -> int:
  """Of a prompt, in tokens, those of its video included."""
  return projector.pooled_tokens(size.frames, patches_of(size)) + size.question


def batch_of(
  size: Size, rows: int, *, new: int, video: bool = True, seed: int = 0
) -> Batch:
  """Rows without padding, of prompts of one length and answers of another.

  Args:
    size: of the prompts and their videos.
    rows: in the batch.
    new: length of the answers; 0 for prompts alone.
    video: False puts text in the places of the video, as a peer without video has it.
    seed: of the random tokens and features.
  """
  rng, patches, start = np.random.default_rng(seed), patches_of(size), prompt_len(size)
  tokens = rng.integers(1, size.llm["vocab"], (rows, start + new), np.int32)
  shape = (rows, size.frames, patches, size.vision["embed"])
  if video:
    tokens[:, : start - size.question] = VIDEO_TOKEN
  else:
    shape = (rows, 1, 1, size.vision["embed"])
  features = rng.standard_normal(shape, np.float32).astype(np.float16)
  mask = np.ones(tokens.shape, bool)
  answer = mask & (np.arange(start + new) >= start)
  return jax.device_put(Batch(features, tokens, mask, answer))


# Random weights, made where they are to be: a 7B is not in bfloat16 first.


def shapes_of(model: vlm.VLM, base: str) -> Params:
  """Shapes and dtypes of a model's frozen variables."""
  params = shapes_lib.param_shapes(model)
  if base == "none":
    return {"params": params}
  quantise = functools.partial(
    quantization.quantise, paths=llama.QUANTISED, scheme=base
  )
  return jax.eval_shape(quantise, params)


def random_weights(shapes: Params) -> Params:
  """Arrays of these shapes, leaf by leaf on the device.

  Random and not zeros, with which a chip is faster than with anyone's weights.
  """

  def make(path, leaf):
    name = sharding.path_of(path)
    key = jax.random.key(zlib.crc32(name.encode()))
    return _fill(key, name.split("/")[-1], leaf.shape, leaf.dtype)

  return jax.tree_util.tree_map_with_path(make, shapes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fill(
  key: Key[Array, ""], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Array:
  if name in _FILL:
    return jnp.full(shape, _FILL[name], dtype)
  if name == "codes":
    return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
  return 0.02 * jax.random.normal(key, shape, dtype)
