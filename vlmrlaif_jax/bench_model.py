"""What bench.py measures: a model of random weights, and what its steps have to do."""

import functools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from vlmrlaif_jax import convert, sharding
from vlmrlaif_jax.models import clip, llama, lora, projector, quant, vlm
from vlmrlaif_jax.types import Params

# The attention of each of JAX's backends, unless another is asked for.
ATTENTION = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}
# What leaves are filled with; kernels, quantised or not, then have a deviation of 0.02.
_FILL = {"scale": 1.0, "block_scale": 0.04, "channel_scale": 2.7e-4}


class Chip(NamedTuple):
  """The most that a chip can do, by its maker's data sheet."""

  flops: float  # A second, in bfloat16 without sparsity.
  bandwidth: float  # Of its memory, in bytes a second.


CHIPS = {  # By what JAX and PyTorch call the device.
  "NVIDIA H200": Chip(989e12, 4.8e12),
  "NVIDIA H100 80GB HBM3": Chip(989e12, 3.35e12),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.039e12),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 1.555e12),
  "TPU v5 lite": Chip(197e12, 0.819e12),  # v5e
  "TPU v5": Chip(459e12, 2.765e12),  # v5p
}


class Size(NamedTuple):
  """A model's shape, and how much it is given to do."""

  llm: Mapping[str, int]  # Fields of llama.Model.
  vision: Mapping[str, int]  # Of the tower, which does not run: videos are features.
  frames: int  # Of each video.
  rows: int  # Of a step of fine-tuning,
  time: int  # and their length, video tokens included.
  prompt: int  # What decoding starts from, in text tokens,
  new: int  # and how many tokens are added.
  batches: tuple[int, ...]  # How many rows are decoded together.
  warmup: int  # Runs that are not timed,
  repeats: int  # and runs of which the median is taken.


SIZES = {
  "tiny": Size(
    llm=dict(vocab=2048, embed=256, mlp=704, layers=2, heads=8, kv_heads=8),
    vision=clip.VARIANTS["tiny"],
    frames=12,
    rows=4,
    time=128,
    prompt=64,
    new=32,
    batches=(1, 4, 16),
    warmup=1,
    repeats=5,
  ),
  "7b": Size(
    llm=llama.VARIANTS["7b"],
    vision=clip.VARIANTS["l14_336"],
    frames=50,
    rows=8,
    time=1024,
    prompt=512,
    new=128,
    batches=(1, 16, 64),
    warmup=2,
    repeats=10,
  ),
}


class Bench(NamedTuple):
  """What is to be measured."""

  name: str  # Of the size, for the rows and the folder.
  size: Size
  base: str  # "bf16", "nf4" or "int8": what the frozen kernels are held in.
  what: tuple[str, ...]  # Keys of OURS.
  peer: bool  # Whether PyTorch is measured too.
  rank: int  # Of the LoRA update.
  attention: str  # Of models/attention.py; "": the backend's own.
  scratch: Path  # Gets the checkpoint that is loaded.


# Random weights, made where they are to be: a 7B is not in bfloat16 first.


def attention_of(bench: Bench) -> str:
  return bench.attention or ATTENTION[jax.default_backend()]


def model_of(bench: Bench) -> vlm.VLM:
  """Computing in bfloat16, with remat, as a 7B is trained."""
  types = dict(dtype="bfloat16", param_dtype="bfloat16")
  llm = llama.Model(
    **bench.size.llm,
    rank=bench.rank,
    alpha=2.0 * bench.rank,
    attention=attention_of(bench),
    remat="full",
    **types,
  )
  tower = clip.VisionTower(**bench.size.vision, **types)
  return vlm.VLM(tower, projector.Projector(llm.embed, dtype="bfloat16"), llm)


def shapes_of(model: vlm.VLM, base: str) -> Params:
  """Shapes and dtypes of a model's frozen variables."""
  params = convert.param_shapes(model)
  if base == "bf16":
    return {"params": params}
  quantise = functools.partial(quant.quantise, paths=llama.QUANTISED, scheme=base)
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


# What each step has to do, counted from shapes.


class Flops(NamedTuple):
  """Of one step of LoRA training."""

  model: float  # What it has to compute.
  hardware: float  # And what it computes twice, to save memory.


def sft_flops(model: vlm.VLM, *, rows: int, time: int, frames: int) -> Flops:
  """A multiplication and an addition are two; what is not a matmul is none.

  A frozen kernel of n weights takes 2 n a token forward, and 2 n for the gradient of
  its input; a LoRA factor takes 2 n more for its own. Attention is counted for the
  causal half, whether or not a backend computes the other, and has two gradients for
  each of its two products. The projector reads all patches, and has no gradient.
  Twice computed are, at most, the layers' forward (remat) and the logits (by chunk).

  Args:
    rows: of the batch.
    time: of each row, in tokens, video tokens included.
    frames: of each row's video; 0 for a model that has none.
  """
  shapes = convert.param_shapes(model)
  llm, tower, tokens = model.llm, model.vision, rows * time
  flat = flax.traverse_util.flatten_dict(shapes["llm"]["blocks"], sep="/")
  kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
  inputs_and_outputs = sum(sum(leaf.shape[1:]) for leaf in kernels.values())
  layers = 2 * tokens * lora.count(kernels)
  factors = 2 * tokens * llm.layers * llm.rank * inputs_and_outputs
  logits = 2 * tokens * llm.embed * llm.vocab
  width = llm.heads * (llm.head_dim or llm.embed // llm.heads)
  attention = 2 * rows * llm.layers * width * time * (time + 1)
  patches = rows * frames * (tower.image // tower.patch) ** 2
  projected = 2 * patches * (tower.embed + llm.embed) * llm.embed
  needed = 2 * (layers + logits) + 3 * (factors + attention) + projected
  return Flops(needed, needed + layers + factors + attention + logits)


def bytes_read(shapes: Params) -> int:
  """Of weights, at each step of decoding: all of the language model's but the rows of
  the embedding that are not looked up."""
  llm = {name: tree["llm"] for name, tree in shapes.items()}
  size = lambda leaf: leaf.size * leaf.dtype.itemsize
  embedding = shapes["params"]["llm"]["embed"]["embedding"]
  return sum(map(size, jax.tree.leaves(llm))) - size(embedding)
