"""Sweeps meshes and microbatches of a slice: which fit, and which is fastest.

Estimates from shapes exclude configurations that cannot fit. The fastest of the others
are compiled until `top` meshes fit.
"""

import math
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.core.types import ModelPass
from vlmrlaif_jax.planner import abstract_run, plan, roofline, topologies
from vlmrlaif_jax.planner.abstract_run import plan_recipe_stages
from vlmrlaif_jax.planner.plan import NoteFn, Target
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import RowSplit, get_stage

# Estimated share of memory up to which a configuration is compiled: an estimate may be
# too high.
_MAX_ESTIMATED_SHARE = 1.15
_TRIES = 6  # Greatest number of compilations for each mesh of `top`.
_MIN_CONTEXT_TOKENS = 2048  # Fewest tokens of a row per device of "context".


ParallelConfig = dict[str, int]  # Mesh and microbatches: values by dotted setting.


def sweep_meshes(
  config: ConfigDict,
  target: Target,
  stage: str,
  cache: pathlib.Path,
  top: int,
  note: NoteFn,
) -> list[JsonRow]:
  """Finds the fastest configurations of a stage that fit, fastest first.

  If none fits, the one closest to fitting is returned.

  Args:
    config: A recipe's config; its mesh and microbatches are ignored.
    target: The slice.
    stage: Name of the stage.
    cache: Folder of compiled programs' results.
    top: Meshes to find; 0 compiles nothing and returns the best by estimate.
    note: Receives a line of progress.

  Returns:
    Rows of plan_stage, each with the flags of its configuration as "line".

  Raises:
    ValueError: No mesh divides the stage's rows and matrices.
  """
  section = get_stage(stage).section
  estimates = list(_estimate_all(config, target, stage, note))
  if not estimates:
    raise ValueError(
      f"no mesh of {len(target.devices)} devices divides the rows and the matrices of "
      f"{stage}. Set another --config.{section}.batch_size"
    )
  likely = [x for x in estimates if _get_memory_share(x[1]) <= _MAX_ESTIMATED_SHARE]
  note(
    f"{stage}: {len(likely)} of {len(estimates)} configurations may fit "
    f"{target.topology.name}, by estimate"
  )
  likely.sort(key=lambda each: each[1]["step_s"])
  tried: list[JsonRow] = []
  for parallel, estimate in likely:
    if len(tried) == _TRIES * top or sum(row["fits"] for row in tried) == top:
      break
    # More microbatches on a mesh that fits are not faster.
    known = any(row["fits"] and row["mesh"] == estimate["mesh"] for row in tried)
    if known or _is_hopeless(estimate, tried):
      continue
    note(f"{stage}: {estimate['line']}: about {estimate['step_s']:.4g} s a step")
    (row,) = plan.plan_recipe(
      apply_parallel_config(config, parallel), target, [stage], cache, note
    )
    tried.append({**row, "line": estimate["line"]})
  tried = tried or [row for _, row in estimates]
  fit = sorted((r for r in tried if r["fits"]), key=lambda row: row["step_s"])
  return fit[: top or 1] or [min(tried, key=_get_memory_share)]


def _get_memory_share(row: JsonRow) -> float:
  """Returns the largest share of a device's memory that a function needs."""
  return max(f["peak"] / f["limit"] for f in row["functions"])


def _is_hopeless(estimate: JsonRow, tried: list[JsonRow]) -> bool:
  """Returns whether an estimate does not fit if it is off as far as failed ones."""
  excess = {
    f["function"]: f["peak"] / f["estimate"]
    for row in tried
    for f in row["functions"]
    if not f["fits"]
  }
  return any(
    f["peak"] * excess.get(f["function"], 0.0) > f["limit"]
    for f in estimate["functions"]
  )


def _estimate_all(
  config, target, stage, note
) -> Iterator[tuple[ParallelConfig, JsonRow]]:
  """Yields all configurations that divide the rows and matrices, with estimates."""
  section, passes = get_stage(stage).section, _list_passes(config, target, stage)
  all_meshes = [
    sizes
    for sizes in list_meshes(config, stage, len(target.devices))
    if is_spreadable(passes, sizes["context"])
  ]
  for number, sizes in enumerate(all_meshes):
    note(f"{stage}: estimating mesh {number + 1} of {len(all_meshes)}")
    mesh_settings = {f"mesh.{axis}": size for axis, size in sizes.items()}
    try:
      mesh = sharding.make_mesh(**sizes, devices=target.devices)
      sized = apply_parallel_config(config, mesh_settings)
      run = abstract_run.create_abstract_run(sized, mesh)
    except ValueError:  # The mesh does not divide a matrix.
      continue
    if _has_split_heads(run):
      continue
    shards = sharding.num_batch_shards(mesh)
    for count in list_microbatches(config, stage, shards):
      count_setting = {f"{section}.microbatches": count} if count else {}
      parallel = mesh_settings | count_setting
      run = run._replace(config=apply_parallel_config(config, parallel))
      (planned,) = plan_recipe_stages(run, [stage])
      line = " ".join(f"--config.{key}={value}" for key, value in parallel.items())
      yield parallel, {**plan.plan_stage(run, planned, target), "line": line}


def _has_split_heads(run: Run) -> bool:
  models = run.policy, run.reward_model
  return any(m.llm.kv_heads % run.mesh.shape["tensor"] for m in models)


def _list_passes(config: ConfigDict, target: Target, stage: str) -> list[ModelPass]:
  """Lists all model passes of a stage, as on one device."""
  mesh = sharding.make_mesh(1, 1, 1, 1, devices=target.devices[:1])
  run = abstract_run.create_abstract_run(config, mesh)
  (planned,) = plan_recipe_stages(run, [stage])
  programs = [f.passes.values() for f in planned.workload.functions]
  return [each for lists in programs for passes in lists for each in passes]


def is_spreadable(passes: list[ModelPass], context: int) -> bool:
  """Returns whether rows are long enough for a "context" axis and divisible by it."""
  if context == 1:
    return True
  if any(p.model.llm.attention == "cudnn" for p in passes):
    return False
  trained = [n for p in passes if p.phase == "train" for n in (p.time, p.chunk)]
  if any(n % context for n in trained):
    return False
  max_row_length = max(map(roofline.get_row_length, passes))
  return max_row_length >= context * _MIN_CONTEXT_TOKENS


def _list_batches(config: ConfigDict, stage: str) -> list[RowSplit]:
  """Lists a stage's batches without microbatches; the update's is the last."""
  definition = get_stage(stage)
  if "microbatches" in config[definition.section]:
    whole = {f"{definition.section}.microbatches": 1}
    config = apply_parallel_config(config, whole)
  return list(definition.get_row_splits(config).values())


def list_meshes(
  config: ConfigDict, stage: str, devices: int
) -> Iterator[dict[str, int]]:
  """Yields the meshes of a number of devices that divide a stage's rows."""
  settings, batches = config[get_stage(stage).section], _list_batches(config, stage)
  for sizes in topologies.factorize(devices, len(sharding.AXES)):
    mesh = dict(zip(sharding.AXES, sizes, strict=True))
    shards = mesh["data"] * mesh["fsdp"]
    divides = all(batch.is_divisible_by(shards) for batch in batches)
    if divides and _has_slots(settings, shards):
      yield mesh


def _has_slots(settings: ConfigDict, shards: int) -> bool:
  """Returns whether each shard of rows has slots for a prompt's responses."""
  responses = settings.get("samples", 0) * settings.batch_size
  if not 0 < settings.get("slots", 0) < responses:
    return True
  return settings.slots % shards == 0 and settings.slots // shards >= settings.samples


def list_microbatches(config: ConfigDict, stage: str, shards: int) -> list[int]:
  """Lists numbers of microbatches that divide a shard's rows; [0] for no setting."""
  if "microbatches" not in config[get_stage(stage).section]:
    return [0]
  rows, parts = _list_batches(config, stage)[-1]
  each = rows // (parts * shards)
  return [n for n in range(1, each + 1) if each % n == 0]


def apply_parallel_config(config: ConfigDict, parallel: ParallelConfig) -> ConfigDict:
  """Returns the config with the mesh and microbatches of a configuration."""
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(parallel)
  return changed


# For a recipe's mesh that the slice cannot have.


def find_mesh_error(config: ConfigDict, target: Target, stages: list[str]) -> str:
  """Returns why a topology cannot have the config's mesh, in a line; "" if it can."""
  try:
    mesh = sharding.make_mesh(**config.mesh, devices=target.devices)
    run = abstract_run.create_abstract_run(config, mesh)
  except ValueError as error:
    return " ".join(str(error).split())
  shards, tensor = sharding.num_batch_shards(mesh), mesh.shape["tensor"]
  if _has_split_heads(run):
    return f"mesh.tensor={tensor} does not divide the key and value heads"
  for stage in _select_section_stages(stages).values():
    for name, batch in get_stage(stage).get_row_splits(config).items():
      if not batch.is_divisible_by(shards):
        return (
          f"{name}: {batch.rows} rows in {batch.parts} parts over {shards} devices "
          f"(data x fsdp) must be a multiple of {batch.parts * shards}"
        )
  return ""


def _select_section_stages(stages: list[str]) -> dict[str, str]:
  """Returns a stage for each section of the config that compiles functions."""
  planned = [s for s in stages if get_stage(s).workload]
  first: dict[str, str] = {}
  for stage in planned:
    first.setdefault(get_stage(stage).section, stage)
  return first


def find_fitting_mesh(
  config: ConfigDict, target: Target, stages: list[str], note: NoteFn
) -> tuple[str, list[JsonRow]]:
  """Finds the mesh that fits all stages in the least time, by estimate.

  Args:
    config: A recipe's config; its mesh and microbatches are ignored.
    target: The slice.
    stages: Names of the stages.
    note: Receives a line of progress.

  Returns:
    The flags of the mesh and microbatches, and a row for each section of the config.

  Raises:
    ValueError: No mesh fits all stages.
  """
  sections = _select_section_stages(stages)
  by_mesh: dict[tuple, dict[str, JsonRow]] = {}
  for section, stage in sections.items():
    for _, row in _estimate_all(config, target, stage, note):
      best = by_mesh.setdefault(tuple(row["mesh"].values()), {})
      if row["fits"] and row["step_s"] < best.get(section, {}).get("step_s", math.inf):
        best[section] = row
  whole = [best for best in by_mesh.values() if len(best) == len(sections)]
  if not whole:
    alone = [s for s in sections if not any(s in best for best in by_mesh.values())]
    why = f"no mesh fits {', '.join(alone)}" if alone else "each fits on another mesh"
    raise ValueError(
      f"by estimate, no mesh of {target.topology.name} fits all of "
      f"{', '.join(sections)}: {why}. Set a larger --topology, smaller batches, or one "
      "--stage"
    )
  taken = lambda best: sum(max(r["steps"], 1) * r["step_s"] for r in best.values())
  rows = list(min(whole, key=taken).values())
  flags = [flag for row in rows for flag in row["line"].split()]
  return " ".join(dict.fromkeys(flags)), rows


def format_sweep(rows: list[JsonRow]) -> str:
  """Formats configurations as a Markdown table, and states which are estimates."""
  lines = []
  for row in rows:
    most = max(row["functions"], key=lambda f: f["peak"])
    lines.append(
      [
        row["stage"],
        "yes" if row["fits"] else "NO",
        f"{row['step_s']:.4g}",
        f"{row['tokens_s_chip']:.4g}",
        f"{row['mfu']:.1%}",
        f"{most['peak'] / topologies.GIB:.3g}",
        f"{most['limit'] / topologies.GIB:.4g}",
        f"`{row['line']}`",
      ]
    )
  head = ["stage", "fits", "estimate, s a step", "tokens/s/chip", "MFU"]
  head += ["peak, GiB", "memory, GiB", "flags"]
  more = [row[name] for row in rows for name in ("note", "advice")]
  estimated = dict.fromkeys(row["stage"] for row in rows if not _is_compiled(row))
  if estimated:
    more.append(
      f"Estimate from shapes: nothing was compiled for {', '.join(estimated)}. "
      "--sweep --top=3 compiles the fastest that may fit."
    )
  return "\n".join(
    [
      markdown_table(lines, head),
      *dict.fromkeys(line for line in more if line),
    ]
  )


def _is_compiled(row: JsonRow) -> bool:
  return any(f["compile_s"] or f["refused"] for f in row["functions"])
