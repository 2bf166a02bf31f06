"""A model of random weights and the work that perf/bench.py gives it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, ModelPass, Params
from vlmrlaif_jax.models import clip, llama, projector, vlm
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.planner import flops

BASES = ("none", "nf4", "int8")  # What the frozen kernels are held in.
# The attention of each of JAX's backends, unless another is asked for.
ATTENTION = {"cpu": "chunked", "gpu": "cudnn", "tpu": "splash"}


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
    unstack=jax.default_backend() == "cpu",  # As loading.configured.
    **types,
  )
  tower = clip.VisionTower(**bench.size.vision, **types)
  return vlm.VLM(tower, projector.Projector(llm.embed, **types), llm)


def patches_of(size: Size) -> int:
  """Of a frame."""
  return (size.vision["image"] // size.vision["patch"]) ** 2


def prompt_len(size: Size) -> int:
  """Of a prompt, in tokens, those of its video included."""
  return projector.count_pooled_tokens(size.frames, patches_of(size)) + size.question


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


def pass_of(model: vlm.VLM, size: Size, prompts: int, answers: int = 1) -> ModelPass:
  """Returns a pass over prompts; the answers to each share its prompt."""
  start = prompt_len(size)
  return ModelPass(
    "train",
    "policy",
    model,
    prompts,
    start + size.new,
    frames=size.frames,
    start=start,
    group=answers,
  )


def forward_flops(of: ModelPass) -> int:
  """Counts one forward pass, LoRA included."""
  return sum(flops.count_forward_flops(of))


def training_flops(of: ModelPass) -> int:
  """Counts a forward pass and the gradient of the factors of LoRA."""
  return flops.count_training_flops(flops.count_forward_flops(of))


def decode_bytes(shapes: Params, model: vlm.VLM, size: Size, rows: int) -> int:
  """Returns the bytes that a step of decoding reads.

  They are all of the language model's weights but the rows of the embedding that are
  not looked up, and the filled part of the cache.

  Args:
    shapes: of all variables, "lora" included.
    model: whose cache it is.
    size: of prompts and answers.
    rows: that are decoded together.
  """
  llm = {name: tree["llm"] for name, tree in shapes.items()}
  bytes_of = lambda leaf: leaf.size * leaf.dtype.itemsize
  embedding = shapes["params"]["llm"]["embed"]["embedding"]
  weights = sum(map(bytes_of, jax.tree.leaves(llm))) - bytes_of(embedding)
  row = 2 * model.llm.layers * flops.get_model_sizes(model).kv_width
  filled = prompt_len(size) + size.new / 2
  return weights + int(rows * filled * row) * jnp.dtype(size.dtype).itemsize


def shapes_of(model: vlm.VLM, base: str) -> Params:
  """Shapes and dtypes of a model's frozen variables."""
  params = vlm.get_param_shapes(model)
  if base == "none":
    return {"params": params}
  quantise = functools.partial(
    quantization.quantize_params, paths=llama.QUANTIZED, scheme=base
  )
  return jax.eval_shape(quantise, params)
