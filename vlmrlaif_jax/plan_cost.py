"""What a pass of a model takes: operations, bytes and messages, from its shapes alone.

A compiler's own count would see the body of a scan over layers once. A multiplication
and an addition are two operations; what is not a product of matrices is none. What is
said of bytes is a model too: each array once for each operator that reads or writes it,
as if a compiler fused what is elementwise and nothing more.
"""

import functools
import math
from typing import NamedTuple

import flax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlmrlaif_jax import convert
from vlmrlaif_jax.models import lora, vlm
from vlmrlaif_jax.topologies import Chip


class Pass(NamedTuple):
  """A model run once over a batch, or a part of it in turn."""

  phase: str  # A key of FLOPS.
  role: str  # Of `frozen`, whose weights are read.
  model: vlm.VLM
  rows: int  # In all.
  time: int  # Tokens of a row; when decoding, slots of the cache.
  new: int = 0  # Tokens to decode.
  logits: bool = True  # Whether it speaks of tokens, and not of scalars.
  frames: int = 0  # Of each row's video, that the projector reads.
  parts: int = 1  # Microbatches.
  chunk: int = 128  # Time steps whose logits exist at once.


class Flops(NamedTuple):
  """Of a pass, on all devices together."""

  model: float  # What has to be computed.
  hardware: float  # And what is computed twice to save memory, or in vain.


class Work(NamedTuple):
  """Of a pass, on each device."""

  flops: float
  bytes: float  # Read and written in its memory.
  moved: float  # Received from other devices.
  messages: float  # Collectives.


class Ways(NamedTuple):
  """In how many parts a mesh splits things."""

  rows: int
  fsdp: int
  tensor: int
  time: int
  devices: int


def ways(mesh: Mesh) -> Ways:
  sizes = dict(mesh.shape)
  return Ways(
    rows=sizes["data"] * sizes["fsdp"],
    fsdp=sizes["fsdp"],
    tensor=sizes["tensor"],
    time=sizes.get("context", 1),
    devices=math.prod(sizes.values()),
  )


class Sizes(NamedTuple):
  """Of a model, as far as its cost depends on them."""

  kernels: int  # Weights of all layers' matrices,
  ends: int  # and the sum of their inputs and outputs.
  width: int  # Of all query heads,
  kv_width: int  # and of those of keys, or of values.
  dtype: int  # Bytes of a number.


@functools.lru_cache
def sizes(model: vlm.VLM) -> Sizes:
  blocks = convert.param_shapes(model)["llm"]["blocks"]
  flat = flax.traverse_util.flatten_dict(blocks, sep="/")
  kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
  llm = model.llm
  head_dim = llm.head_dim or llm.embed // llm.heads
  return Sizes(
    kernels=lora.count(kernels),
    ends=sum(sum(leaf.shape[1:]) for leaf in kernels.values()),
    width=llm.heads * head_dim,
    kv_width=llm.kv_heads * head_dim,
    dtype=jnp.dtype(llm.dtype).itemsize,
  )


# Operations.


def flops(of: Pass) -> Flops:
  """On all devices together."""
  return FLOPS[of.phase](of)


def _products(of: Pass, tokens: int) -> tuple[float, float]:
  """Of the layers' matrices, and of their LoRA factors."""
  size, llm = sizes(of.model), of.model.llm
  return 2.0 * tokens * size.kernels, 2.0 * tokens * llm.layers * llm.rank * size.ends


def _attention(of: Pass) -> tuple[float, float]:
  """Of the causal half, and of what the backend computes."""
  llm, time = of.model.llm, of.time
  half = 2.0 * of.rows * llm.layers * sizes(of.model).width * time * (time + 1)
  return half, half if llm.attention != "xla" else 2 * half * time / (time + 1)


def _logits(of: Pass, tokens: int) -> float:
  return 2.0 * tokens * of.model.llm.embed * of.model.llm.vocab * of.logits


def _projector(of: Pass) -> float:
  tower, embed = of.model.vision, of.model.llm.embed
  patches = of.rows * of.frames * (tower.image // tower.patch) ** 2
  return 2.0 * patches * (tower.embed + embed) * embed


def _forward(of: Pass) -> Flops:
  tokens = of.rows * of.time
  causal, attention = _attention(of)
  rest = sum(_products(of, tokens)) + _logits(of, tokens) + _projector(of)
  return Flops(rest + causal, rest + attention)


def _prefill(of: Pass) -> Flops:
  whole = _forward(of._replace(logits=False))
  last = _logits(of, of.rows)
  return Flops(whole.model + last, whole.hardware + last)


def _decode(of: Pass) -> Flops:
  """Each step reads every slot, filled or not."""
  size, llm = sizes(of.model), of.model.llm
  step = sum(_products(of, of.rows)) + _logits(of, of.rows)
  slots = 4.0 * of.rows * llm.layers * size.width
  filled = of.time - of.new / 2
  return Flops(of.new * (step + slots * filled), of.new * (step + slots * of.time))


def _train(of: Pass) -> Flops:
  """Frozen kernels have a gradient of their input alone; attention has two, and so
  have LoRA factors. Remat runs the layers' forward once more, and each chunk its
  logits."""
  tokens = of.rows * of.time
  layers, factors = _products(of, tokens)
  causal, attention = _attention(of)
  logits, projected = _logits(of, tokens), _projector(of)
  again = {"none": 0.0, "dots": attention, "full": layers + factors + attention}
  model = 2 * (layers + logits) + 3 * (factors + causal) + projected
  twice = 3 * (attention - causal) + again[of.model.llm.remat] + logits
  return Flops(model, model + twice)


def _encode(of: Pass) -> Flops:
  """The vision tower, up to the layer that is read."""
  tower = of.model.vision
  patches = (tower.image // tower.patch) ** 2
  images, layers = of.rows * of.frames, tower.selected
  each = tower.embed * (4 * tower.embed + 2 * tower.mlp)
  products = 2.0 * images * patches * (layers * each + 3 * tower.patch**2 * tower.embed)
  both = products + 4.0 * images * layers * tower.embed * patches**2
  return Flops(both, both)


FLOPS = {
  "encode": _encode,
  "prefill": _prefill,
  "decode": _decode,
  "forward": _forward,
  "train": _train,
}
# How often a pass reads the weights, works through activations, and exchanges them.
SWEEPS = {"encode": 1, "prefill": 1, "decode": 1, "forward": 1, "train": 3}


# Bytes and messages.


def work(of: Pass, held: float, ways: Ways) -> Work:
  """On each device.

  Args:
    held: bytes of the language model's layers, as they are held, unsharded.
  """
  each = flops(of).hardware / ways.devices
  if of.phase == "encode":
    return Work(each, _encode_bytes(of, ways), 0.0, 0.0)
  moved, messages = _moved(of, held, ways)
  if of.phase == "decode":
    return Work(each, of.new * _step_bytes(of, held, ways), moved, messages)
  weights = _weight_bytes(of, held, ways) * of.parts
  per_pass = weights + _activation_bytes(of, ways)
  return Work(each, SWEEPS[of.phase] * per_pass, moved, messages)


def _weight_bytes(of: Pass, held: float, ways: Ways) -> float:
  """Of one reading of all layers: gathered, which writes them, and made into numbers
  that can be multiplied with, if they are quantised."""
  plain = sizes(of.model).kernels * sizes(of.model).dtype
  gathered = held * (3 if ways.fsdp > 1 else 1)
  return (gathered + (2 * plain if held < plain else 0)) / ways.tensor


def _activation_bytes(of: Pass, ways: Ways) -> float:
  """Of one pass through all layers, and of the logits."""
  llm, size = of.model.llm, sizes(of.model)
  rows = of.rows / ways.rows
  whole = 8 * llm.embed  # Residual and norms, on each device of "tensor".
  split = 4 * size.width + 4 * size.kv_width + 6 * llm.mlp
  tokens = rows * of.time / ways.time
  each = tokens * llm.layers * size.dtype * (whole + split / ways.tensor)
  square = 0.0
  if llm.attention == "xla":  # Scores in float32, written, masked, softmaxed, read.
    square = rows * llm.heads * of.time**2 / ways.tensor / ways.time * 4 * 4
  logits = tokens * llm.vocab / ways.tensor * 4 * 3 * of.logits
  if of.phase == "prefill":
    logits /= of.time
  return each + square * llm.layers + logits


def _step_bytes(of: Pass, held: float, ways: Ways) -> float:
  """Of one step of decoding: each device its own part of the weights, and its cache."""
  size, llm = sizes(of.model), of.model.llm
  plain = size.kernels * size.dtype
  weights = held + (2 * plain if held < plain else 0) + llm.embed * llm.vocab * 2
  return weights / ways.fsdp / ways.tensor + cache_bytes(of, ways)


def cache_bytes(of: Pass, ways: Ways) -> float:
  """Of keys and values of all layers, on each device; heads that "tensor" does not
  divide are whole on each."""
  llm, size = of.model.llm, sizes(of.model)
  heads = ways.tensor if llm.kv_heads % ways.tensor == 0 else 1
  slots = of.rows / ways.rows * of.time
  return 2 * slots * llm.layers * size.kv_width * size.dtype / heads


def _encode_bytes(of: Pass, ways: Ways) -> float:
  tower = of.model.vision
  patches = (tower.image // tower.patch) ** 2
  tokens = of.rows / ways.rows * of.frames * patches
  size = jnp.dtype(tower.dtype).itemsize
  square = tower.heads * patches * 4 * 4
  each = size * (12 * tower.embed + 4 * tower.mlp) + square
  return tokens * tower.selected * each


def _moved(of: Pass, held: float, ways: Ways) -> tuple[float, float]:
  """(bytes, messages): "fsdp" gathers weights, but when decoding what is multiplied
  with them, which is less; "tensor" adds up what each made of attention and MLP."""
  llm, size = of.model.llm, sizes(of.model)
  share = lambda count: (count - 1) / count
  tokens = of.rows / ways.rows * (1 if of.phase == "decode" else of.time / ways.time)
  layer = tokens * llm.embed * size.dtype
  moved = messages = 0.0
  times = of.new if of.phase == "decode" else SWEEPS[of.phase] * of.parts
  if ways.fsdp > 1 and of.phase == "decode":
    rows = of.rows * size.dtype * size.ends / ways.tensor
    moved += times * llm.layers * rows * share(ways.fsdp)
    messages += times * llm.layers * 14
  elif ways.fsdp > 1:
    moved += times * held / ways.tensor * share(ways.fsdp)
    messages += times * llm.layers * 7
  if ways.tensor > 1:
    again = of.new if of.phase == "decode" else SWEEPS[of.phase]
    moved += again * llm.layers * 2 * 2 * layer * share(ways.tensor)
    messages += times * llm.layers * 2
  return moved, messages


class Seconds(NamedTuple):
  """Of a piece of work, if each resource were all that it waits for."""

  compute: float
  memory: float
  links: float

  @property
  def longest(self) -> float:
    """What it takes: the others go on meanwhile."""
    return max(self)

  @property
  def bound(self) -> str:
    """What it waits for."""
    return max(self._fields, key=lambda name: self[self._fields.index(name)])


def seconds(work: Work, chip: Chip, *, hosts: int = 1) -> Seconds:
  """At the chip's own limits.

  Args:
    hosts: over how many a collective goes; beyond one, the slower way counts.
  """
  links = min(chip.links, chip.outside) if hosts > 1 and chip.outside else chip.links
  return Seconds(
    work.flops / (chip.flops / chip.devices),
    work.bytes / (chip.bandwidth / chip.devices),
    work.moved / (links / chip.devices) + work.messages * chip.latency,
  )
