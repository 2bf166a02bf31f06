"""All meshes and microbatches of a slice: which fit, and which is fastest.

The shapes' own model of memory and time leaves out what cannot do; of the others the
fastest are compiled, until as many as asked for are known to fit.
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

# The estimate may be off: up to here it is left to the compiler to say.
_DOUBT = 1.15
_TRIES = 6  # How many are compiled for each that is asked for.
_STRETCH = 2048  # The fewest tokens of a row that are worth a device of "context".


ParallelConfig = dict[str, int]  # One way to run a stage: settings by dotted name.


def sweep_meshes(
  config: ConfigDict,
  to: Target,
  stage: str,
  cache: pathlib.Path,
  top: int,
  note: NoteFn,
) -> list[JsonRow]:
  """Ways that fit, the fastest first: rows of plan.of_stage, with the "line" to paste.

  If none does, the one that comes nearest, as far as is known.

  Args:
    top: how many are to be found; 0: the best by estimate, and none is compiled.
  """
  section = get_stage(stage).section
  found = list(_estimated(config, to, stage, note))
  if not found:
    raise ValueError(
      f"no mesh of {len(to.devices)} devices divides the rows and the matrices of "
      f"{stage}: take another --config.{section}.batch_size"
    )
  likely = [(way, row) for way, row in found if _fullest(row) <= _DOUBT]
  note(f"{stage}: {len(likely)} of {len(found)} ways may fit {to.topology.name}")
  likely.sort(key=lambda each: each[1]["step_s"])
  tried: list[JsonRow] = []
  for way, guess in likely:
    if len(tried) == _TRIES * top or sum(row["fits"] for row in tried) == top:
      break
    # Where a mesh does, more microbatches on it are no faster.
    known = any(row["fits"] and row["mesh"] == guess["mesh"] for row in tried)
    if known or _hopeless(guess, tried):
      continue
    note(f"{stage}: {guess['line']}: some {guess['step_s']:.4g} s a step")
    (row,) = plan.plan_recipe(
      apply_parallel_config(config, way), to, [stage], cache, note
    )
    tried.append({**row, "line": guess["line"]})
  tried = tried or [row for _, row in found]
  fit = sorted((r for r in tried if r["fits"]), key=lambda row: row["step_s"])
  return fit[: top or 1] or [min(tried, key=_fullest)]


def _fullest(row: JsonRow) -> float:
  """The share of its memory that the largest function takes."""
  return max(f["peak"] / f["limit"] for f in row["functions"])


def _hopeless(guess: JsonRow, tried: list[JsonRow]) -> bool:
  """Whether a way would not fit if the compiler went as far beyond its estimate as
  with those that did not.
  """
  excess = {
    f["function"]: f["peak"] / f["estimate"]
    for row in tried
    for f in row["functions"]
    if not f["fits"]
  }
  return any(
    f["peak"] * excess.get(f["function"], 0.0) > f["limit"] for f in guess["functions"]
  )


def _estimated(config, to, stage, note) -> Iterator[tuple[ParallelConfig, JsonRow]]:
  """Every way that divides everything, with what the shapes say of it."""
  section, passes = get_stage(stage).section, _passes(config, to, stage)
  all_meshes = [
    sizes
    for sizes in list_meshes(config, stage, len(to.devices))
    if is_spreadable(passes, sizes["context"])
  ]
  for number, sizes in enumerate(all_meshes):
    note(f"{stage}: mesh {number + 1} of {len(all_meshes)}")
    laid = {f"mesh.{axis}": size for axis, size in sizes.items()}
    try:
      mesh = sharding.make_mesh(**sizes, devices=to.devices)
      run = abstract_run.create_abstract_run(apply_parallel_config(config, laid), mesh)
    except ValueError:  # A matrix that the mesh does not divide.
      continue
    if _splits_heads(run):
      continue
    shards = sharding.num_batch_shards(mesh)
    for count in list_microbatches(config, stage, shards):
      way = laid | ({f"{section}.microbatches": count} if count else {})
      run = run._replace(config=apply_parallel_config(config, way))
      (made,) = plan_recipe_stages(run, [stage])
      line = " ".join(f"--config.{key}={value}" for key, value in way.items())
      yield way, {**plan.plan_stage(run, made, to), "line": line}


def _splits_heads(run: Run) -> bool:
  models = run.policy, run.reward_model
  return any(m.llm.kv_heads % run.mesh.shape["tensor"] for m in models)


def _passes(config: ConfigDict, to: Target, stage: str) -> list[ModelPass]:
  """All of a stage, as they would be on one device."""
  mesh = sharding.make_mesh(1, 1, 1, 1, devices=to.devices[:1])
  (made,) = plan_recipe_stages(abstract_run.create_abstract_run(config, mesh), [stage])
  return [
    p for f in made.workload.functions for each in f.passes.values() for p in each
  ]


def is_spreadable(passes: list[ModelPass], context: int) -> bool:
  """Whether rows are long enough to be spread over so many devices, and may be."""
  if context == 1:
    return True
  if any(p.model.llm.attention == "cudnn" for p in passes):
    return False
  trained = [n for p in passes if p.phase == "train" for n in (p.time, p.chunk)]
  longest = max(map(roofline.get_row_length, passes))
  return longest >= context * _STRETCH and not any(n % context for n in trained)


def _batches(config: ConfigDict, stage: str) -> list[RowSplit]:
  """The batches of a stage without microbatches; that of an update is the last."""
  found = get_stage(stage)
  if "microbatches" in config[found.section]:
    config = apply_parallel_config(config, {f"{found.section}.microbatches": 1})
  return list(found.get_row_splits(config).values())


def list_meshes(
  config: ConfigDict, stage: str, devices: int
) -> Iterator[dict[str, int]]:
  """All meshes of so many devices that a stage's rows spread over."""
  given, batches = config[get_stage(stage).section], _batches(config, stage)
  for sizes in topologies.factorize(devices, len(sharding.AXES)):
    mesh = dict(zip(sharding.AXES, sizes, strict=True))
    shards = mesh["data"] * mesh["fsdp"]
    divides = all(batch.is_divisible_by(shards) for batch in batches)
    if divides and _has_slots(given, shards):
      yield mesh


def _has_slots(given: ConfigDict, shards: int) -> bool:
  """Whether each shard of rows has room for a prompt's responses."""
  if not 0 < given.get("slots", 0) < given.get("samples", 0) * given.batch_size:
    return True
  return given.slots % shards == 0 and given.slots // shards >= given.samples


def list_microbatches(config: ConfigDict, stage: str, shards: int) -> list[int]:
  """All numbers of microbatches that divide the rows of a shard; 0 for none at all."""
  if "microbatches" not in config[get_stage(stage).section]:
    return [0]
  rows, parts = _batches(config, stage)[-1]
  each = rows // (parts * shards)
  return [n for n in range(1, each + 1) if each % n == 0]


def apply_parallel_config(config: ConfigDict, way: ParallelConfig) -> ConfigDict:
  """The config that runs a stage in this way."""
  made = config.copy_and_resolve_references()
  made.update_from_flattened_dict(way)
  return made


# Where the recipe's own mesh will not do.


def find_mesh_error(config: ConfigDict, to: Target, stages: list[str]) -> str:
  """Why the config's mesh cannot be laid on a topology, in a line; "" if it can."""
  try:
    mesh = sharding.make_mesh(**config.mesh, devices=to.devices)
    run = abstract_run.create_abstract_run(config, mesh)
  except ValueError as error:
    return " ".join(str(error).split())
  shards, tensor = sharding.num_batch_shards(mesh), mesh.shape["tensor"]
  if _splits_heads(run):
    return f"key and value heads are not divided by tensor={tensor}"
  for stage in _sections(stages).values():
    for name, batch in get_stage(stage).get_row_splits(config).items():
      if not batch.is_divisible_by(shards):
        return (
          f"{name}: {batch.rows} rows in {batch.parts} parts over {shards} devices "
          f"(data x fsdp) are no multiple of {batch.parts * shards}"
        )
  return ""


def _sections(stages: list[str]) -> dict[str, str]:
  """A stage of each section of the config, of those that compile anything."""
  planned = [s for s in stages if get_stage(s).workload]
  first: dict[str, str] = {}
  for stage in planned:
    first.setdefault(get_stage(stage).section, stage)
  return first


def find_fitting_mesh(
  config: ConfigDict, to: Target, stages: list[str], note: NoteFn
) -> tuple[str, list[JsonRow]]:
  """The mesh that fits all stages and takes them the least time, by estimate alone.

  Returns:
    The line to paste, and a row for each section of the config.

  Raises:
    ValueError: there is none.
  """
  sections = _sections(stages)
  found: dict[tuple, dict[str, JsonRow]] = {}
  for section, stage in sections.items():
    for _, row in _estimated(config, to, stage, note):
      best = found.setdefault(tuple(row["mesh"].values()), {})
      if row["fits"] and row["step_s"] < best.get(section, {}).get("step_s", math.inf):
        best[section] = row
  whole = [best for best in found.values() if len(best) == len(sections)]
  if not whole:
    alone = [s for s in sections if not any(s in best for best in found.values())]
    why = f"{', '.join(alone)} fits none" if alone else "each fits another: see --stage"
    raise ValueError(
      f"no mesh of {to.topology.name} fits all of {', '.join(sections)}: {why}; take "
      "a larger slice, or smaller batches"
    )
  taken = lambda best: sum(max(r["steps"], 1) * r["step_s"] for r in best.values())
  rows = list(min(whole, key=taken).values())
  flags = [flag for row in rows for flag in row["line"].split()]
  return " ".join(dict.fromkeys(flags)), rows


def format_sweep(rows: list[JsonRow]) -> str:
  """Ways, the best first, as Markdown."""
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
  head = ["stage", "fits", "s a step", "tokens/s/chip", "MFU", "peak, GiB", "of"]
  more = (row[name] for row in rows for name in ("note", "advice"))
  return "\n".join(
    [
      markdown_table(lines, [*head, "line"]),
      *dict.fromkeys(line for line in more if line),
    ]
  )
