"""Estimates the time of a model pass from its FLOPs, bytes and messages: a roofline.

All are counted from shapes, because a compiler counts the body of a scan over layers
once. A multiplication and an addition are two FLOPs; only matmuls count. Bytes assume
that each operator reads and writes each array once, with elementwise operators fused.
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
  """FLOPs of a pass on all devices together."""

  model: float  # FLOPs that the result requires.
  hardware: float  # FLOPs with recomputation and masked work.


class Work(NamedTuple):
  """Work of a pass on each device."""

  flops: float
  bytes: float  # Bytes read and written in its memory.
  received_bytes: float  # Bytes received from other devices.
  messages: float  # Number of collectives.
  activation_bytes: float = 0.0  # Bytes of `bytes` that are not weights.
  allocated_bytes: float = 0.0  # Bytes that a program allocates in a call.


class MeshSplit(NamedTuple):
  """Numbers of parts that a mesh splits arrays into."""

  rows: int  # Parts of the batch, over "data" and "fsdp".
  fsdp: int  # Parts of each weight over "fsdp".
  tensor: int  # Parts of each weight over "tensor".
  time: int  # Parts of a row over "context".


def get_mesh_split(mesh: Mesh) -> MeshSplit:
  """Returns the numbers of parts that a mesh splits arrays into."""
  sizes = mesh.shape
  rows = sharding.num_batch_shards(mesh)
  return MeshSplit(rows, sizes["fsdp"], sizes["tensor"], sizes["context"])


# FLOPs.


def count_pass_flops(model_pass: ModelPass) -> PassFlops:
  """Counts the FLOPs of a pass on all devices together."""
  return FLOP_COUNTERS[model_pass.phase](model_pass)


def get_row_length(model_pass: ModelPass) -> int:
  """Returns the tokens of a row: a prompt and its group's responses."""
  return model_pass.start + model_pass.group * (model_pass.time - model_pass.start)


def _count_attended_pairs(p: ModelPass) -> int:
  """Counts the query-key pairs of a row that the backend computes, masked ones too."""
  backend, time = p.model.llm.attention, p.time
  if p.group == 1:
    return time**2 if backend == "xla" else count_causal_pairs(time)
  responses = p.group * (time - p.start) * time
  if backend == "xla":
    return p.start**2 + responses
  if backend == "chunked":
    return count_causal_pairs(p.start) + responses
  # The other kernels copy the prompt for each response.
  return p.group * count_causal_pairs(time)


def count_cached_pairs(model_pass: ModelPass) -> int:
  """Counts the query-key pairs of a row whose weights are stored for each head."""
  backend = model_pass.model.llm.attention
  if backend == "chunked" and model_pass.group > 1:
    return model_pass.group * (model_pass.time - model_pass.start) * model_pass.time
  return _count_attended_pairs(model_pass) if backend == "xla" else 0


def _count_attention_flops(p: ModelPass) -> float:
  """Counts the FLOPs of attention that the backend computes, masked ones too."""
  llm, width = p.model.llm, get_model_sizes(p.model).width
  return 4.0 * p.rows * _count_attended_pairs(p) * llm.layers * width


def _count_forward(p: ModelPass) -> PassFlops:
  parts = flops_lib.count_forward_flops(p)
  return PassFlops(sum(parts), sum(parts) - parts.attention + _count_attention_flops(p))


def _count_prefill(p: ModelPass) -> PassFlops:
  whole = _count_forward(p._replace(logits=False))
  last = flops_lib.count_forward_flops(p._replace(start=p.time - 1)).logits
  return PassFlops(whole.model + last, whole.hardware + last)


def _count_decode(p: ModelPass) -> PassFlops:
  """Counts all steps of decoding; each reads every cache slot, filled or not."""
  size, llm = get_model_sizes(p.model), p.model.llm
  token = flops_lib.count_forward_flops(p._replace(time=1, start=0, frames=0))
  step = sum(token) - token.attention
  slots = 4.0 * p.rows * llm.layers * size.width
  filled = p.time - p.new / 2
  return PassFlops(p.new * (step + slots * filled), p.new * (step + slots * p.time))


def _count_train(p: ModelPass) -> PassFlops:
  """Counts training; remat repeats the layers' forward, and each chunk its logits."""
  parts, attention = flops_lib.count_forward_flops(p), _count_attention_flops(p)
  layers = parts.layers + parts.factors
  repeated = {"none": 0.0, "dots": attention, "full": layers + attention}
  model = flops_lib.count_training_flops(parts)
  twice = 3 * (attention - parts.attention) + parts.logits
  return PassFlops(model, model + twice + repeated[p.model.llm.remat])


def _count_encode(p: ModelPass) -> PassFlops:
  """Counts the vision tower up to the layer whose output is read."""
  tower, images = p.model.vision.measure(p.grid), p.rows * p.frames
  patch = tower.layers * tower.kernels + tower.inputs * tower.embed
  products = 2.0 * images * (tower.patches * patch + tower.merged)
  both = products + 4.0 * images * tower.layers * tower.embed * tower.pairs
  return PassFlops(both, both)


FLOP_COUNTERS = {
  "encode": _count_encode,
  "prefill": _count_prefill,
  "decode": _count_decode,
  "forward": _count_forward,
  "train": _count_train,
}
# Number of times that a pass reads weights, and computes and exchanges activations.
PASSES_OVER_WEIGHTS = {"encode": 1, "prefill": 1, "decode": 1, "forward": 1, "train": 3}


# Bytes and messages.


def compute_work(model_pass: ModelPass, weight_bytes: float, split: MeshSplit) -> Work:
  """Computes the work of a pass on each device.

  Args:
    model_pass: The pass.
    weight_bytes: Stored bytes of the language model's layers, unsharded.
    split: How the mesh splits arrays.
  """
  total = count_pass_flops(model_pass).hardware
  if model_pass.phase == "encode":  # All devices with the same rows do the same work.
    activation_bytes = _count_encode_bytes(model_pass, split)
    return Work(total / split.rows, activation_bytes, 0.0, 0.0, activation_bytes)
  received_bytes, messages = _count_received(model_pass, weight_bytes, split)
  if model_pass.phase == "decode":  # A step has one token, so "context" splits nothing.
    each, steps = total / (split.rows * split.tensor), model_pass.new * model_pass.parts
    step = _count_step_bytes(model_pass, weight_bytes, split)
    cache = steps * count_cache_bytes(model_pass, split)
    return Work(each, steps * step, received_bytes, messages, cache)
  each = total / (split.rows * split.tensor) / count_row_parts(model_pass, split)
  weights = _count_weight_bytes(model_pass, weight_bytes, split)
  sweeps = PASSES_OVER_WEIGHTS[model_pass.phase]
  activation_bytes = _count_activation_bytes(model_pass, split)
  total = sweeps * (weights * model_pass.parts + activation_bytes)
  return Work(each, total, received_bytes, messages, sweeps * activation_bytes)


def count_row_parts(model_pass: ModelPass, split: MeshSplit) -> int:
  """Returns the parts of a row: 1 for a group's row that "context" does not divide."""
  divides = get_row_length(model_pass) % split.time == 0
  return split.time if model_pass.group == 1 or divides else 1


def _count_weight_bytes(p: ModelPass, weight_bytes: float, split: MeshSplit) -> float:
  """Counts one read of all layers' weights, with gathering and dequantization."""
  plain = get_model_sizes(p.model).kernels * get_model_sizes(p.model).dtype
  gathered = weight_bytes * (3 if split.fsdp > 1 else 1)
  return (gathered + (2 * plain if weight_bytes < plain else 0)) / split.tensor


def _count_activation_bytes(p: ModelPass, split: MeshSplit) -> float:
  """Counts the activations of one pass through all layers, and the logits."""
  llm, size = p.model.llm, get_model_sizes(p.model)
  rows = p.rows / split.rows / count_row_parts(p, split)
  whole = 8 * llm.embed  # Residuals and norms, which "tensor" does not split.
  sharded = 4 * size.width + 4 * size.kv_width + 6 * llm.mlp
  each = whole + sharded / split.tensor
  each *= rows * get_row_length(p) * llm.layers * size.dtype
  # Attention scores in float32 are written, masked, normalized and read.
  square = rows * llm.heads * count_cached_pairs(p) / split.tensor * 4 * 4
  positions = 1 if p.phase == "prefill" else p.group * (p.time - p.start)
  logits = rows * positions * llm.vocab / split.tensor * 4 * 3 * p.logits
  return each + square * llm.layers + logits


def _count_step_bytes(p: ModelPass, weight_bytes: float, split: MeshSplit) -> float:
  """Counts one decoding step: a device's part of the weights, and its cache."""
  size, llm = get_model_sizes(p.model), p.model.llm
  plain = size.kernels * size.dtype
  weights = weight_bytes + (2 * plain if weight_bytes < plain else 0)
  weights += llm.embed * llm.vocab * 2
  return weights / split.fsdp / split.tensor + count_cache_bytes(p, split)


def count_cache_bytes(model_pass: ModelPass, split: MeshSplit) -> float:
  """Counts the bytes of the keys and values of all layers on each device.

  "tensor" splits heads only if it divides them; "context" does not split the cache.
  """
  llm, size = model_pass.model.llm, get_model_sizes(model_pass.model)
  heads = split.tensor if llm.kv_heads % split.tensor == 0 else 1
  slots = model_pass.rows / model_pass.parts / split.rows * model_pass.time
  return 2 * slots * llm.layers * size.kv_width * size.dtype / heads


def _count_encode_bytes(p: ModelPass, split: MeshSplit) -> float:
  tower, images = p.model.vision.measure(p.grid), p.rows / split.rows * p.frames
  size = jnp.dtype(p.model.vision.dtype).itemsize
  square = tower.heads * tower.pairs * 4 * 4
  each = tower.patches * size * (12 * tower.embed + 4 * tower.mlp) + square
  return images * tower.layers * each


def _count_received(
  p: ModelPass, weight_bytes: float, split: MeshSplit
) -> tuple[float, float]:
  """Counts the bytes that a device receives and its messages.

  "fsdp" gathers weights; when decoding it exchanges activations, which are smaller.
  "tensor" sums the outputs of attention and MLP. "context" gathers keys and values.
  """
  llm, size = p.model.llm, get_model_sizes(p.model)
  share = lambda count: (count - 1) / count
  decodes, parts = p.phase == "decode", count_row_parts(p, split)
  tokens = p.rows / split.rows * (1 / p.parts if decodes else get_row_length(p) / parts)
  layer = tokens * llm.embed * size.dtype
  received_bytes = messages = 0.0
  times = (p.new if decodes else PASSES_OVER_WEIGHTS[p.phase]) * p.parts
  if split.fsdp > 1 and decodes:
    rows = p.rows / p.parts * size.dtype * size.ends / split.tensor
    received_bytes += times * llm.layers * rows * share(split.fsdp)
    messages += times * llm.layers * 14
  elif split.fsdp > 1:
    received_bytes += times * weight_bytes / split.tensor * share(split.fsdp)
    messages += times * llm.layers * 7
  if split.tensor > 1:
    passes = times if decodes else PASSES_OVER_WEIGHTS[p.phase]
    received_bytes += passes * llm.layers * 2 * 2 * layer * share(split.tensor)
    messages += times * llm.layers * 2
  if parts > 1 and not decodes:
    gathered = tokens * parts * 2 * size.kv_width / split.tensor * size.dtype
    passes = PASSES_OVER_WEIGHTS[p.phase]
    received_bytes += passes * llm.layers * gathered * share(parts)
    messages += times * llm.layers * 2
  return received_bytes, messages


class TimeEstimate(NamedTuple):
  """Seconds of a piece of work, by the resource that it uses."""

  compute: float
  memory: float
  links: float
  between: float = 0.0  # Seconds that do not overlap with other resources.

  @property
  def seconds(self) -> float:
    """Seconds in total: the first three resources work concurrently."""
    return max(self[:3]) + self.between

  @property
  def bound(self) -> str:
    """Name of the resource with the most seconds."""
    return max(self._fields, key=lambda name: getattr(self, name))


def estimate_seconds(work: Work, chip: Chip, *, hosts: int = 1) -> TimeEstimate:
  """Estimates the seconds of work at a chip's limits.

  Args:
    work: The work of each device.
    chip: The chip's limits.
    hosts: Number of hosts; collectives over several use the slower of both links.
  """
  links = min(chip.links, chip.outside) if hosts > 1 and chip.outside else chip.links
  seconds = work.received_bytes / (links / chip.devices)
  seconds += work.messages * chip.latency
  if chip.host is not None:
    return _estimate_host_seconds(work, chip.host)._replace(links=seconds)
  return TimeEstimate(
    work.flops / (chip.flops / chip.devices),
    work.bytes / (chip.bandwidth / chip.devices),
    seconds,
  )


def _estimate_host_seconds(work: Work, host: Host) -> TimeEstimate:
  """Estimates the seconds on a CPU, which runs one operator at a time.

  Work on activations between matmuls does not overlap with the matmuls.
  """
  return TimeEstimate(
    work.flops / host.flops,
    (work.bytes - work.activation_bytes) / host.weight_bandwidth,
    0.0,
    work.activation_bytes / host.activation_bandwidth
    + work.allocated_bytes * host.allocation_seconds,
  )
