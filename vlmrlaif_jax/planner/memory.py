"""Estimates the device memory of a run from shapes, before anything is compiled.

`check_memory` rejects a run that cannot fit. Bytes of weights, optimizer states and
caches are exact. Activations are a model of the compiler's work; docs/planning.md
compares it with the compiler's own numbers.
"""

import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Frozen, ModelPass
from vlmrlaif_jax.planner import abstract_run
from vlmrlaif_jax.planner.abstract_run import PlannedStage, plan_recipe_stages
from vlmrlaif_jax.planner.compile import CompiledProgram
from vlmrlaif_jax.planner.flops import count_row_features, get_model_sizes
from vlmrlaif_jax.planner.roofline import (
  MeshSplit,
  count_cache_bytes,
  count_cached_pairs,
  count_row_parts,
  get_mesh_split,
  get_row_length,
)
from vlmrlaif_jax.planner.topologies import GIB
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import DeviceFunction
from vlmrlaif_jax.stages.stage import get_stage

HEADROOM = 0.12  # Share of a device's memory for allocations that no compiler counts.


class MemoryEstimate(NamedTuple):
  """Bytes per device at the point where a function uses most memory."""

  # By role; a shared array counts for its first role, and an array that the function
  # does not read counts as "resident".
  weights: dict[str, float]
  optimizer: float  # Trained parameters and optimizer state.
  videos: float  # Videos or their features, and the batch.
  cache: float  # Keys and values.
  activations: float  # Activations and gradients of trained parameters.
  gathered: float  # Gathered weights of a layer, and logits.

  @property
  def peak(self) -> float:
    """Sum of all parts, in bytes."""
    return sum(self.weights.values()) + sum(self[1:])


def count_shard_bytes(tree: PyTree) -> float:
  """Counts the bytes per device of a tree of shapes; a repeated array counts once."""
  leaves = jax.tree.leaves(Frozen({"": tree}))
  return float(
    sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  )


def count_role_bytes(roles: PyTree) -> dict[str, float]:
  """Counts the bytes per device of each role, without arrays of earlier roles."""
  counted: dict[str, float] = {}
  seen: list[PyTree] = []
  for name, tree in roles.items():
    seen.append(tree)
    counted[name] = count_shard_bytes(seen) - sum(counted.values())
  return counted


def count_peak_bytes(
  run: Run, stage: PlannedStage, function: DeviceFunction, program: CompiledProgram
) -> float:
  """Returns the peak bytes per device of a compiled program.

  They are the compiler's temporaries, the arguments and all other resident arrays.
  """
  if program.refused:
    return program.peak
  resident = _list_resident(run, stage, function)
  return program.allocated_bytes + count_shard_bytes((resident, program.placed_args))


def _list_resident(run: Run, stage: PlannedStage, function: DeviceFunction) -> PyTree:
  """Returns the arrays on the devices while a function runs, used or not.

  These are the loaded models and, after videos are encoded, the weights and states of
  all functions of the stage, and the rollouts that are sampled ahead.
  """
  loaded = run.base, run.reward_model_base
  if function.name == "encode":
    return loaded
  functions = stage.workload.functions
  return loaded, [(each.roles, each.state, each.in_flight) for each in functions]


def estimate_memory(
  run: Run, stage: PlannedStage, function: DeviceFunction
) -> MemoryEstimate:
  """Estimates the memory of the program that needs most in a function."""
  resident = _list_resident(run, stage, function)
  weights = count_role_bytes(
    {"state": function.state, **_select_read(function), "resident": resident}
  )
  optimizer, split = weights.pop("state"), get_mesh_split(run.mesh)
  estimates = [
    MemoryEstimate(weights, optimizer, *_estimate_program(run, function, passes, split))
    for passes in function.passes.values()
  ]
  return max(estimates, key=lambda memory: memory.peak)


def _estimate_program(
  run, function: DeviceFunction, passes: list[ModelPass], split: MeshSplit
) -> tuple[float, float, float, float]:
  """Returns the last four fields of MemoryEstimate for a program.

  Residuals and gradients live through all passes; other bytes are those of the largest
  pass.
  """
  trained = [each for each in passes if each.phase == "train"]
  residuals = sum(_count_residuals(each, split) for each in trained)
  gradients = count_shard_bytes(function.state.params) if function.state else 0.0
  moments = [
    (
      _count_caches(each, passes, split),
      # Decoding one token gathers no weights.
      0.0 if each.phase == "decode" else _count_working(each, split),
      _count_gathered(each, split, function),
    )
    for each in passes
  ]
  cache, working, gathered = max(moments, key=sum)
  videos = _count_videos(run, passes, split)
  return videos, cache, residuals + gradients + working, gathered


def _select_read(function: DeviceFunction) -> dict[str, PyTree]:
  """Returns the roles, without the vision tower unless the function is `encode`."""
  if function.name == "encode":
    return function.roles

  def drop_vision(tree):
    if isinstance(tree, dict) and "params" in tree and "vision" in tree["params"]:
      rest = {k: v for k, v in tree["params"].items() if k != "vision"}
      return {**tree, "params": rest}
    return tree

  return {role: drop_vision(tree) for role, tree in function.roles.items()}


def _count_videos(run, passes: list[ModelPass], split: MeshSplit) -> float:
  """Counts the bytes of float16 features, or of pixels if videos are encoded.

  Each response to a prompt has its own copy of the features.
  """
  first, tower = passes[0], run.policy.vision
  rows = first.rows
  if first.phase == "encode":
    shape = tower.measure(first.grid)
    frame = math.prod(shape.pixels) * jnp.dtype(shape.pixel_dtype).itemsize
    return rows / split.rows * first.frames * frame
  copies = sum(p.rows for p in passes if p.phase == "decode" and p.rows > rows)
  numbers = first.frames * math.prod(tower.feature_shape)
  return (rows + copies) / split.rows * numbers * 2


def _count_unstacked(function: DeviceFunction, p: ModelPass) -> float:
  """Counts the copy of the layers' weights that decoding makes on a CPU."""
  if not p.model.llm.unstack:
    return 0.0
  trees = function.roles[p.role].values()
  return count_shard_bytes([tree["llm"]["blocks"] for tree in trees if "llm" in tree])


def _count_rows(p: ModelPass, split: MeshSplit) -> float:
  """Returns the rows of a device in a microbatch, fractions for parts of a row."""
  return p.rows / split.rows / p.parts / count_row_parts(p, split)


def _count_working(p: ModelPass, split: MeshSplit) -> float:
  """Counts the bytes of one layer, or of the projector on all patches if larger."""
  if p.phase == "encode":
    tower = p.model.vision.measure(p.grid)
    images = p.rows / split.rows * p.frames
    square = tower.heads * tower.patches**2 * 4
    wide = tower.patches * (4 * tower.embed + tower.mlp + 3 * tower.inputs)
    return images * (wide * jnp.dtype(p.model.vision.dtype).itemsize + square)
  llm, size = p.model.llm, get_model_sizes(p.model)
  tokens = _count_rows(p, split) * get_row_length(p)
  sharded = (2 * size.width + 2 * size.kv_width + 3 * llm.mlp) / split.tensor
  layer = tokens * (6 * llm.embed + sharded) * size.dtype
  if p.phase == "train":
    layer *= 2  # Each array has a gradient of its size.
  square = _count_rows(p, split) * llm.heads / split.tensor * count_cached_pairs(p) * 4
  square *= 3 if p.phase == "train" else 2
  # These kernels copy the prompt into a row for each response.
  if p.group > 1 and llm.attention in ("splash", "cudnn"):
    copied = _count_rows(p, split) * p.group * p.time * 2 * (size.width + size.kv_width)
    square += copied / split.tensor * size.dtype * (2 if p.phase == "train" else 1)
  # Features of DeepStack exist while all layers run.
  layer += size.taps * tokens * llm.embed * size.dtype
  width = (1 + size.taps) * llm.embed
  features = p.rows / split.rows / p.parts * count_row_features(p)
  return max(layer + square, features * width * size.dtype * 2)


def _count_residuals(p: ModelPass, split: MeshSplit) -> float:
  """Counts the bytes that the forward pass saves for the backward pass."""
  llm, size = p.model.llm, get_model_sizes(p.model)
  outputs = (2 * size.width + 2 * size.kv_width + 2 * llm.mlp) / split.tensor
  saved = {
    "full": llm.embed,
    "dots": 3 * llm.embed + outputs,
    "none": 8 * llm.embed + 2 * outputs,
  }[llm.remat]
  square = 0.0
  if llm.remat == "none":
    square = llm.heads / split.tensor * count_cached_pairs(p) * 4 * 2
  row = get_row_length(p) * saved * size.dtype + square
  return llm.layers * _count_rows(p, split) * row


def _count_caches(p: ModelPass, passes: list[ModelPass], split: MeshSplit) -> float:
  """Counts the decoding cache and the prefill cache, which it is copied from."""
  if p.phase != "decode":
    return 0.0
  read = [each for each in passes if each.phase == "prefill"]
  caches = [count_cache_bytes(each, split) for each in read]
  return count_cache_bytes(p, split) + sum(caches)


def _count_gathered(p: ModelPass, split: MeshSplit, function: DeviceFunction) -> float:
  """Counts two layers' gathered weights, a chunk's logits and the LM head."""
  if p.phase == "encode":
    return 0.0
  if p.phase == "decode":
    return _count_unstacked(function, p)
  llm, size = p.model.llm, get_model_sizes(p.model)
  layers = 2 * size.kernels / llm.layers * size.dtype / split.tensor
  if not p.logits:
    return layers
  # The compiler decides how responses of a group are spread over "context".
  spread = split.time if p.group == 1 and p.phase != "prefill" else 1
  rows = p.rows / split.rows / p.parts * p.group / spread
  steps = 1 if p.phase == "prefill" else min(p.chunk, p.time - p.start)
  copies = 4 if p.phase == "train" else 3
  logits = rows * steps * llm.vocab / split.tensor * 4 * copies
  head = llm.embed * llm.vocab / split.tensor * size.dtype
  return layers + logits + head


# Before a run.


def check_memory(config: ConfigDict, stages: Iterable[str]) -> None:
  """Raises if a stage does not fit in the memory of this machine's devices.

  The limit has no headroom, because an estimate may be 10 % too high.

  Raises:
    UserError: A function needs too much memory, or "splash" attention would divide
      key and value heads.
  """
  mesh = sharding.make_mesh(**config.mesh)
  run, tensor = abstract_run.create_abstract_run(config, mesh), mesh.shape["tensor"]
  model = config.model
  for path, vlm in (
    (model.path, run.policy),
    (model.reward_model_path, run.reward_model),
  ):
    if model.attention == "splash" and vlm.llm.kv_heads % tensor:
      raise UserError(
        f"{path} has {vlm.llm.kv_heads} key and value heads, but splash attention "
        f"requires a multiple of --config.mesh.tensor={tensor}. Set another "
        "--config.mesh.tensor, or --config.model.attention=xla"
      )
  limit = get_device_memory(jax.local_devices()[0], jax.local_device_count())
  for stage in plan_recipe_stages(run, stages):
    for function in stage.workload.functions:
      memory = estimate_memory(run, stage, function)
      if memory.peak > limit:
        raise UserError(explain_misfit(run, stage.name, function.name, memory, limit))


def get_device_memory(device: jax.Device, devices: int) -> float:
  """Returns the bytes that a device may use, infinity if its runtime reports none.

  Args:
    device: A local device.
    devices: Number of devices of this process; CPU devices share the machine's memory.
  """
  if device.platform != "cpu":
    stats = device.memory_stats() or {}  # Not every runtime reports them.
    return float(stats.get("bytes_limit", math.inf))
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices


def explain_misfit(
  run: Run, stage: str, function: str, memory: MemoryEstimate, limit: float
) -> str:
  """Returns the message for a function that does not fit, with advice."""
  return (
    f"{stage}: {function} would hold {memory.peak / GIB:.2f} GiB on each device, which "
    f"has {limit / GIB:.2f} GiB.\n{list_advice(run, stage, memory)}\n"
    "  Run `python launch/plan.py --sweep` to list meshes and microbatches that fit."
  )


def list_advice(run: Run, stage: str, memory: MemoryEstimate) -> str:
  """Lists the parts of an estimate, largest first, and how to reduce the largest."""
  parts = {f"weights of {role}": size for role, size in memory.weights.items()}
  if "weights of resident" in parts:
    parts["weights not read"] = parts.pop("weights of resident")
  parts |= dict(zip(memory._fields[1:], memory[1:], strict=True))
  largest, *_ = ordered = sorted(parts, key=lambda name: -parts[name])
  listed = ", ".join(
    f"{name} {parts[name] / GIB:.2f}"
    for name in ordered
    if parts[name] > 0.01 * memory.peak
  )
  remedy = _suggest_remedy(run, stage, largest)
  return f"  GiB: {listed}\n  Largest: {largest}. Set {remedy}"


def _suggest_remedy(run: Run, stage: str, part: str) -> str:
  model, section = run.config.model, get_stage(stage).section
  settings = run.config[section]
  batch = "batch" if "batch" in settings else "batch_size"
  rows = f"a smaller --config.{section}.{batch}"
  if part.startswith("weights"):
    less = "" if model.quant != "none" else ", or --config.model.quant=nf4"
    return f"a larger --config.mesh.fsdp on more devices{less}"
  if part in ("cache", "videos"):
    return f"{rows}, or a larger --config.mesh.fsdp on more devices"
  if part == "activations":
    has_parts = "microbatches" in settings
    remedies = [f"a larger --config.{section}.microbatches" if has_parts else rows]
    if model.remat != "full":
      remedies.append("--config.model.remat=full")
    if run.policy.llm.attention == "xla":
      remedies.append("--config.model.attention=splash (TPU) or cudnn (GPU)")
    remedies.append("--config.mesh.context=2 (long rows)")
    return ", or ".join(remedies)
  if part == "gathered":
    less = f"a smaller --config.{section}.chunk, or " if "chunk" in settings else ""
    return f"{less}--config.mesh.tensor=2"
  return (
    "a larger --config.mesh.fsdp on more devices, or a smaller --config.model.lora_rank"
  )
