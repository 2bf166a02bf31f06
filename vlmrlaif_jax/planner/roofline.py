"""What a pass of a model takes: operations, bytes and messages, from its shapes alone.

A compiler's own count would see the body of a scan over layers once. A multiplication
and an addition are two operations; what is not a product of matrices is none. What is
said of bytes is a model too: each array once for each operator that reads or writes it,
as if a compiler fused what is elementwise and nothing more.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import ModelPass
from vlmrlaif_jax.planner import flops as flops_lib
from vlmrlaif_jax.planner.flops import count_causal_pairs, get_model_sizes
from vlmrlaif_jax.planner.topologies import Chip, Host


class PassFlops(NamedTuple):
  """Of a pass, on all devices together."""

  model: float  # What has to be computed.
  hardware: float  # And what is computed twice to save memory, or in vain.


class Work(NamedTuple):
  """Of a pass, on each device."""

  flops: float
  bytes: float  # Read and written in its memory.
  moved: float  # Received from other devices.
  messages: float  # Collectives.
  handed: float = 0.0  # Of the bytes, those that are of no weights.
  fresh: float = 0.0  # Bytes of memory that a program has to be given first.


class MeshSplit(NamedTuple):
  """In how many parts a mesh splits things."""

  rows: int
  fsdp: int
  tensor: int
  time: int


def get_mesh_split(mesh: Mesh) -> MeshSplit:
  sizes = mesh.shape
  rows = sharding.num_batch_shards(mesh)
  return MeshSplit(rows, sizes["fsdp"], sizes["tensor"], sizes["context"])


# Operations.


def count_pass_flops(of: ModelPass) -> PassFlops:
  """On all devices together."""
  return FLOP_COUNTERS[of.phase](of)


def get_row_length(of: ModelPass) -> int:
  """Tokens of a row."""
  return of.start + of.group * (of.time - of.start)


def _pairs(of: ModelPass) -> int:
  """Of a row's tokens, that the backend multiplies; see attention.attend."""
  backend, time = of.model.llm.attention, of.time
  if of.group == 1:
    return time**2 if backend == "xla" else count_causal_pairs(time)
  responses = of.group * (time - of.start) * time
  if backend == "xla":
    return of.start**2 + responses
  if backend == "chunked":
    return count_causal_pairs(of.start) + responses
  return of.group * count_causal_pairs(
    time
  )  # Each response behind a copy of its prompt.


def count_cached_pairs(of: ModelPass) -> int:
  """Of a row's tokens, whose weights are held, each a number of every head."""
  backend = of.model.llm.attention
  if backend == "chunked" and of.group > 1:
    return of.group * (of.time - of.start) * of.time
  return _pairs(of) if backend == "xla" else 0


def _attention(of: ModelPass) -> float:
  """Of what the backend computes."""
  return (
    4.0 * of.rows * _pairs(of) * of.model.llm.layers * get_model_sizes(of.model).width
  )


def _forward(of: ModelPass) -> PassFlops:
  parts = flops_lib.count_forward_flops(of)
  return PassFlops(sum(parts), sum(parts) - parts.attention + _attention(of))


def _prefill(of: ModelPass) -> PassFlops:
  whole = _forward(of._replace(logits=False))
  last = flops_lib.count_forward_flops(of._replace(start=of.time - 1)).logits
  return PassFlops(whole.model + last, whole.hardware + last)


def _decode(of: ModelPass) -> PassFlops:
  """Each step reads every slot, filled or not."""
  size, llm = get_model_sizes(of.model), of.model.llm
  token = flops_lib.count_forward_flops(of._replace(time=1, start=0, frames=0))
  step = sum(token) - token.attention
  slots = 4.0 * of.rows * llm.layers * size.width
  filled = of.time - of.new / 2
  return PassFlops(of.new * (step + slots * filled), of.new * (step + slots * of.time))


def _train(of: ModelPass) -> PassFlops:
  """Remat runs the layers' forward once more, and each chunk its logits."""
  parts, attention = flops_lib.count_forward_flops(of), _attention(of)
  layers = parts.layers + parts.factors
  again = {"none": 0.0, "dots": attention, "full": layers + attention}
  model = flops_lib.count_training_flops(parts)
  twice = 3 * (attention - parts.attention) + parts.logits
  return PassFlops(model, model + twice + again[of.model.llm.remat])


def _encode(of: ModelPass) -> PassFlops:
  """The vision tower, up to the layer that is read."""
  tower, patches = of.model.vision, of.model.vision.patch_count
  images, layers = of.rows * of.frames, tower.selected
  each = tower.embed * (4 * tower.embed + 2 * tower.mlp)
  products = 2.0 * images * patches * (layers * each + 3 * tower.patch**2 * tower.embed)
  both = products + 4.0 * images * layers * tower.embed * patches**2
  return PassFlops(both, both)


FLOP_COUNTERS = {
  "encode": _encode,
  "prefill": _prefill,
  "decode": _decode,
  "forward": _forward,
  "train": _train,
}
# How often a pass reads the weights, works through activations, and exchanges them.
PASSES_OVER_WEIGHTS = {"encode": 1, "prefill": 1, "decode": 1, "forward": 1, "train": 3}


# Bytes and messages.


def compute_work(of: ModelPass, held: float, ways: MeshSplit) -> Work:
  """On each device.

  Args:
    held: bytes of the language model's layers, as they are held, unsharded.
  """
  total = count_pass_flops(of).hardware
  if of.phase == "encode":  # Each device of a row does the same.
    handed = _encode_bytes(of, ways)
    return Work(total / ways.rows, handed, 0.0, 0.0, handed)
  moved, messages = _moved(of, held, ways)
  if of.phase == "decode":  # There is no time to spread.
    each, steps = total / (ways.rows * ways.tensor), of.new * of.parts
    step, cache = _step_bytes(of, held, ways), count_cache_bytes(of, ways)
    return Work(each, steps * step, moved, messages, steps * cache)
  each = total / (ways.rows * ways.tensor) / time_ways(of, ways)
  weights, sweeps = (
    _weight_bytes(of, held, ways) * of.parts,
    PASSES_OVER_WEIGHTS[of.phase],
  )
  handed = _activation_bytes(of, ways)
  total = sweeps * (weights + handed)
  return Work(each, total, moved, messages, sweeps * handed)


def time_ways(of: ModelPass, ways: MeshSplit) -> int:
  """In how many parts a row is: one of a group in those alone that divide it."""
  return ways.time if of.group == 1 or get_row_length(of) % ways.time == 0 else 1


def _weight_bytes(of: ModelPass, held: float, ways: MeshSplit) -> float:
  """Of one reading of all layers: gathered, which writes them, and made into numbers
  that can be multiplied with, if they are quantised.
  """
  plain = get_model_sizes(of.model).kernels * get_model_sizes(of.model).dtype
  gathered = held * (3 if ways.fsdp > 1 else 1)
  return (gathered + (2 * plain if held < plain else 0)) / ways.tensor


def _activation_bytes(of: ModelPass, ways: MeshSplit) -> float:
  """Of one pass through all layers, and of the logits."""
  llm, size = of.model.llm, get_model_sizes(of.model)
  rows = of.rows / ways.rows / time_ways(of, ways)
  whole = 8 * llm.embed  # Residual and norms, on each device of "tensor".
  split = 4 * size.width + 4 * size.kv_width + 6 * llm.mlp
  each = (
    rows * get_row_length(of) * llm.layers * size.dtype * (whole + split / ways.tensor)
  )
  # Scores in float32, written, masked, softmaxed, read.
  square = rows * llm.heads * count_cached_pairs(of) / ways.tensor * 4 * 4
  speaks = 1 if of.phase == "prefill" else of.group * (of.time - of.start)
  logits = rows * speaks * llm.vocab / ways.tensor * 4 * 3 * of.logits
  return each + square * llm.layers + logits


def _step_bytes(of: ModelPass, held: float, ways: MeshSplit) -> float:
  """Of one step of decoding: each device its own part of the weights, and its cache."""
  size, llm = get_model_sizes(of.model), of.model.llm
  plain = size.kernels * size.dtype
  weights = held + (2 * plain if held < plain else 0) + llm.embed * llm.vocab * 2
  return weights / ways.fsdp / ways.tensor + count_cache_bytes(of, ways)


def count_cache_bytes(of: ModelPass, ways: MeshSplit) -> float:
  """Of keys and values of all layers, on each device; heads that "tensor" does not
  divide are whole on each, and time is.
  """
  llm, size = of.model.llm, get_model_sizes(of.model)
  heads = ways.tensor if llm.kv_heads % ways.tensor == 0 else 1
  slots = of.rows / of.parts / ways.rows * of.time
  return 2 * slots * llm.layers * size.kv_width * size.dtype / heads


def _encode_bytes(of: ModelPass, ways: MeshSplit) -> float:
  tower, patches = of.model.vision, of.model.vision.patch_count
  tokens = of.rows / ways.rows * of.frames * patches
  size = jnp.dtype(tower.dtype).itemsize
  square = tower.heads * patches * 4 * 4
  each = size * (12 * tower.embed + 4 * tower.mlp) + square
  return tokens * tower.selected * each


def _moved(of: ModelPass, held: float, ways: MeshSplit) -> tuple[float, float]:
  """(bytes, messages): "fsdp" gathers weights, but when decoding what is multiplied
  with them, which is less; "tensor" adds up what each made of attention and MLP;
  "context" gathers keys and values.
  """
  llm, size = of.model.llm, get_model_sizes(of.model)
  share = lambda count: (count - 1) / count
  decodes, parts = of.phase == "decode", time_ways(of, ways)
  tokens = (
    of.rows / ways.rows * (1 / of.parts if decodes else get_row_length(of) / parts)
  )
  layer = tokens * llm.embed * size.dtype
  moved = messages = 0.0
  times = (of.new if decodes else PASSES_OVER_WEIGHTS[of.phase]) * of.parts
  if ways.fsdp > 1 and decodes:
    rows = of.rows / of.parts * size.dtype * size.ends / ways.tensor
    moved += times * llm.layers * rows * share(ways.fsdp)
    messages += times * llm.layers * 14
  elif ways.fsdp > 1:
    moved += times * held / ways.tensor * share(ways.fsdp)
    messages += times * llm.layers * 7
  if ways.tensor > 1:
    again = times if decodes else PASSES_OVER_WEIGHTS[of.phase]
    moved += again * llm.layers * 2 * 2 * layer * share(ways.tensor)
    messages += times * llm.layers * 2
  if parts > 1 and not decodes:
    seen = tokens * parts * 2 * size.kv_width / ways.tensor * size.dtype
    moved += PASSES_OVER_WEIGHTS[of.phase] * llm.layers * seen * share(parts)
    messages += times * llm.layers * 2
  return moved, messages


class TimeEstimate(NamedTuple):
  """Of a piece of work, if each resource were all that it waits for."""

  compute: float
  memory: float
  links: float
  between: float = 0.0  # When nothing else goes on.

  @property
  def longest(self) -> float:
    """What it takes: of the first three the others go on meanwhile."""
    return max(self[:3]) + self.between

  @property
  def bound(self) -> str:
    """What it waits for."""
    return max(self._fields, key=lambda name: getattr(self, name))


def estimate_seconds(work: Work, chip: Chip, *, hosts: int = 1) -> TimeEstimate:
  """At the chip's own limits.

  Args:
    hosts: over how many a collective goes; beyond one, the slower way counts.
  """
  links = min(chip.links, chip.outside) if hosts > 1 and chip.outside else chip.links
  moved = work.moved / (links / chip.devices) + work.messages * chip.latency
  if chip.host is not None:
    return _on_host(work, chip.host)._replace(links=moved)
  return TimeEstimate(
    work.flops / (chip.flops / chip.devices),
    work.bytes / (chip.bandwidth / chip.devices),
    moved,
  )


def _on_host(work: Work, host: Host) -> TimeEstimate:
  """On a CPU, which has one operator wait for the other: between two products with
  weights it works through what they hand on.
  """
  return TimeEstimate(
    work.flops / host.flops,
    (work.bytes - work.handed) / host.weights,
    0.0,
    work.handed / host.handed + work.fresh * host.fresh,
  )
