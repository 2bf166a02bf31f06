"""What a run will hold in memory, from its shapes alone: before anything is compiled.

Weights, the optimiser's state and caches are exact. What lives between them is a model
of the compiler's work, which docs/planning.md holds against the compiler's own word.
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
from vlmrlaif_jax.planner.flops import get_model_sizes
from vlmrlaif_jax.planner.roofline import (
  MeshSplit,
  count_cache_bytes,
  count_cached_pairs,
  get_mesh_split,
  get_row_length,
  time_ways,
)
from vlmrlaif_jax.planner.topologies import GIB
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import DeviceFunction
from vlmrlaif_jax.stages.stage import get_stage

HEADROOM = 0.12  # Of a device's memory, for what no compiler counts.


class MemoryEstimate(NamedTuple):
  """What a function holds on each device when it holds most, in bytes."""

  weights: dict[str, float]  # By role; arrays in several count for the first.
  optimiser: float  # And what is trained, where it is.
  videos: float  # And batches.
  cache: float  # Keys and values.
  activations: float  # And gradients of what is trained.
  gathered: float  # Weights of a layer, whole, and logits.

  @property
  def peak(self) -> float:
    return sum(self.weights.values()) + sum(self[1:])


def count_shard_bytes(tree: PyTree) -> float:
  """Of a tree of shapes, on each device; an array that stands twice counts once."""
  leaves = jax.tree.leaves(Frozen({"": tree}))
  return float(
    sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  )


def count_role_bytes(roles: PyTree) -> dict[str, float]:
  """Of each role on each device, without what an earlier one has counted."""
  counted: dict[str, float] = {}
  seen: list[PyTree] = []
  for name, tree in roles.items():
    seen.append(tree)
    counted[name] = count_shard_bytes(seen) - sum(counted.values())
  return counted


def peak_device_bytes(
  run: Run, stage: PlannedStage, function: DeviceFunction, program: CompiledProgram
) -> float:
  """Bytes on each device when a program of a function holds most: what the compiler
  gives it, its arguments, and what waits meanwhile.
  """
  if program.refused:
    return program.peak
  resident = _resident(run, stage, function)
  return program.fresh + count_shard_bytes((resident, program.given))


def _resident(run: Run, stage: PlannedStage, function: DeviceFunction) -> PyTree:
  """Returns what is on the devices while a function runs, whether it reads it or not.

  These are the models that the run was made with and, once its videos are encoded, the
  weights and states of all functions of the stage.
  """
  loaded = run.base, run.reward_model_base
  if function.name == "encode":
    return loaded
  return loaded, [(each.roles, each.state) for each in stage.workload.functions]


def estimate_memory(
  run: Run, stage: PlannedStage, function: DeviceFunction
) -> MemoryEstimate:
  """Of a function, the program in it that holds most."""
  waits = _resident(run, stage, function)
  weights = count_role_bytes(
    {"state": function.state, **_read(function), "what waits": waits}
  )
  optimiser, ways_ = weights.pop("state"), get_mesh_split(run.mesh)
  found = [
    MemoryEstimate(weights, optimiser, *_of_program(run, function, passes, ways_))
    for passes in function.passes.values()
  ]
  return max(found, key=lambda memory: memory.peak)


def _of_program(
  run, function: DeviceFunction, passes: list[ModelPass], ways_: MeshSplit
) -> tuple[float, float, float, float]:
  """The last four fields of Memory: what lives through all passes of a program, and the
  pass that holds most besides.
  """
  kept = sum(_residuals(each, ways_) for each in passes if each.phase == "train")
  gradients = count_shard_bytes(function.state.params) if function.state else 0.0
  moments = [
    (
      _caches(each, passes, ways_),
      # Weights stay where they are when one token is decoded.
      0.0 if each.phase == "decode" else _working(each, ways_),
      _unstacked(function, each) if each.phase == "decode" else _gathered(each, ways_),
    )
    for each in passes
  ]
  cache, working, gathered = max(moments, key=sum)
  return _videos(run, passes, ways_), cache, kept + gradients + working, gathered


def _read(function: DeviceFunction) -> dict[str, PyTree]:
  """Roles without what none but `encode` reads."""
  if function.name == "encode":
    return function.roles

  def language(tree):
    if isinstance(tree, dict) and "params" in tree and "vision" in tree["params"]:
      rest = {k: v for k, v in tree["params"].items() if k != "vision"}
      return {**tree, "params": rest}
    return tree

  return {role: language(tree) for role, tree in function.roles.items()}


def _videos(run, passes: list[ModelPass], ways_: MeshSplit) -> float:
  """Features of every row, in float16; pixels where they are to be encoded. Each of
  several responses to a prompt is handed out with a copy.
  """
  of, tower = passes[0], run.policy.vision
  if of.phase == "encode":
    return of.rows / ways_.rows * of.frames * tower.image**2 * 3
  copies = sum(p.rows for p in passes if p.phase == "decode" and p.rows > of.rows)
  patches = of.frames * tower.patch_count
  return (of.rows + copies) / ways_.rows * patches * tower.embed * 2


def _unstacked(function: DeviceFunction, of: ModelPass) -> float:
  """The layers' weights once more, where Decoder.unstack_layers copies them."""
  if not of.model.llm.unstack:
    return 0.0
  trees = function.roles[of.role].values()
  return count_shard_bytes([tree["llm"]["blocks"] for tree in trees if "llm" in tree])


def _rows(of: ModelPass, ways_: MeshSplit) -> float:
  """That are worked on at once, less where "context" has others work on parts."""
  return of.rows / ways_.rows / of.parts / time_ways(of, ways_)


def _working(of: ModelPass, ways_: MeshSplit) -> float:
  """Of one layer at work, and of the projector, which sees every patch of a video."""
  if of.phase == "encode":
    tower = of.model.vision
    patches = tower.patch_count
    images = of.rows / ways_.rows * of.frames
    square = tower.heads * patches**2 * 4
    wide = patches * (4 * tower.embed + tower.mlp + 9 * tower.patch**2)
    return images * (wide * jnp.dtype(tower.dtype).itemsize + square)
  llm, size, tower = of.model.llm, get_model_sizes(of.model), of.model.vision
  tokens = _rows(of, ways_) * get_row_length(of)
  split = (2 * size.width + 2 * size.kv_width + 3 * llm.mlp) / ways_.tensor
  layer = tokens * (6 * llm.embed + split) * size.dtype
  if of.phase == "train":
    layer *= 2  # Gradients beside what they are of.
  square = _rows(of, ways_) * llm.heads / ways_.tensor * count_cached_pairs(of) * 4
  square *= 3 if of.phase == "train" else 2
  if of.group > 1 and llm.attention in ("splash", "cudnn"):  # In rows of their own.
    copied = _rows(of, ways_) * of.group * of.time * 2 * (size.width + size.kv_width)
    square += copied / ways_.tensor * size.dtype * (2 if of.phase == "train" else 1)
  patches = of.frames * tower.patch_count
  seen = of.rows / ways_.rows / of.parts * patches * llm.embed * size.dtype * 2
  return max(layer + square, seen)


def _residuals(of: ModelPass, ways_: MeshSplit) -> float:
  """What the backward pass needs of every layer."""
  llm, size = of.model.llm, get_model_sizes(of.model)
  outputs = (2 * size.width + 2 * size.kv_width + 2 * llm.mlp) / ways_.tensor
  kept = {
    "full": llm.embed,
    "dots": 3 * llm.embed + outputs,
    "none": 8 * llm.embed + 2 * outputs,
  }[llm.remat]
  square = 0.0
  if llm.remat == "none":
    square = llm.heads / ways_.tensor * count_cached_pairs(of) * 4 * 2
  row = get_row_length(of) * kept * size.dtype + square
  return llm.layers * _rows(of, ways_) * row


def _caches(of: ModelPass, passes: list[ModelPass], ways_: MeshSplit) -> float:
  """Of what decodes; its prompts' own stand beside it until they are widened."""
  if of.phase != "decode":
    return 0.0
  read = [each for each in passes if each.phase == "prefill"]
  return count_cache_bytes(of, ways_) + sum(
    count_cache_bytes(each, ways_) for each in read
  )


def _gathered(of: ModelPass, ways_: MeshSplit) -> float:
  """Two layers' weights, if they are not held as they are multiplied; a chunk's
  logits and the matrix that makes them.
  """
  if of.phase == "encode":
    return 0.0
  llm, size = of.model.llm, get_model_sizes(of.model)
  layers = 2 * size.kernels / llm.layers * size.dtype / ways_.tensor
  if not of.logits:
    return layers
  # Which part of a group's responses is where, is left to the compiler.
  spread = ways_.time if of.group == 1 and of.phase != "prefill" else 1
  rows = of.rows / ways_.rows / of.parts * of.group / spread
  steps = 1 if of.phase == "prefill" else min(of.chunk, of.time - of.start)
  copies = 4 if of.phase == "train" else 3
  logits = rows * steps * llm.vocab / ways_.tensor * 4 * copies
  head = llm.embed * llm.vocab / ways_.tensor * size.dtype
  return layers + logits + head


# Before a run.


def check_memory(config: ConfigDict, stages: Iterable[str]) -> None:
  """Refuses stages that the devices of this machine cannot run.

  What comes near their memory is let through: an estimate may be a tenth too high.

  Raises:
    UserError: names the function, what it holds most of, and what would hold less; or
      attention heads that a kernel needs whole, and the mesh divides.
  """
  mesh = sharding.make_mesh(**config.mesh)
  run, tensor = abstract_run.create_abstract_run(config, mesh), mesh.shape["tensor"]
  model = config.model
  for path, made in (
    (model.path, run.policy),
    (model.reward_model_path, run.reward_model),
  ):
    if model.attention == "splash" and made.llm.kv_heads % tensor:
      raise UserError(
        f"{path} has {made.llm.kv_heads} key and value heads, which mesh.tensor="
        f"{tensor} does not divide, as splash wants: give another "
        "--config.mesh.tensor, or --config.model.attention=xla"
      )
  limit = get_device_memory(jax.local_devices()[0], jax.local_device_count())
  for stage in plan_recipe_stages(run, stages):
    for function in stage.workload.functions:
      memory = estimate_memory(run, stage, function)
      if memory.peak > limit:
        raise UserError(explain_misfit(run, stage.name, function.name, memory, limit))


def get_device_memory(device: jax.Device, devices: int) -> float:
  """Bytes that a device of this process may hold; infinite where nothing tells.

  Args:
    devices: of the process; on a CPU they share the machine's memory.
  """
  if device.platform != "cpu":
    told = device.memory_stats() or {}  # Not every runtime says.
    return float(told.get("bytes_limit", math.inf))
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices


def explain_misfit(
  run: Run, stage: str, function: str, memory: MemoryEstimate, limit: float
) -> str:
  """Why a function does not fit, and what would."""
  return (
    f"{stage}: {function} would hold {memory.peak / GIB:.2f} GiB on each device, which "
    f"has {limit / GIB:.2f}.\n{list_advice(run, stage, memory)}\n"
    "  python launch/plan.py --sweep says which mesh and microbatches fit."
  )


def list_advice(run: Run, stage: str, memory: MemoryEstimate) -> str:
  """The parts of a memory, the largest first, and what makes that one smaller."""
  parts = {
    **{f"weights of {role}": size for role, size in memory.weights.items()},
    **dict(zip(memory._fields[1:], memory[1:], strict=True)),
  }
  largest, *_ = ordered = sorted(parts, key=lambda name: -parts[name])
  listed = ", ".join(
    f"{name} {parts[name] / GIB:.2f}"
    for name in ordered
    if parts[name] > 0.01 * memory.peak
  )
  remedy = _remedy(run, stage, largest)
  return f"  GiB: {listed}\n  Most are {largest}: {remedy}"


def _remedy(run: Run, stage: str, part: str) -> str:
  model, section = run.config.model, get_stage(stage).section
  given = run.config[section]
  rows = f"a smaller --config.{section}.{'batch' if 'batch' in given else 'batch_size'}"
  if part.startswith("weights"):
    less = "" if model.quant != "none" else ", or --config.model.quant=nf4"
    return f"more devices to --config.mesh.fsdp{less}"
  if part in ("cache", "videos"):
    return f"{rows}, or more devices to --config.mesh.fsdp"
  if part == "activations":
    has_parts = "microbatches" in given
    found = [f"more --config.{section}.microbatches" if has_parts else rows]
    if model.remat != "full":
      found.append("--config.model.remat=full")
    if run.policy.llm.attention == "xla":
      found.append("--config.model.attention=splash (TPU) or cudnn (GPU)")
    found.append("of long rows, --config.mesh.context=2")
    return ", or ".join(found)
  if part == "gathered":
    less = f"a smaller --config.{section}.chunk, or " if "chunk" in given else ""
    return f"{less}--config.mesh.tensor=2"
  return "more devices to --config.mesh.fsdp, or a smaller --config.model.lora_rank"
