"""All meshes and microbatches of a slice: which fit, and which is fastest.

The shapes' own model of memory and time leaves out what cannot do; of the others the
fastest are compiled, until as many as asked for are known to fit.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax import plan, plan_run, plan_stages, sharding, topologies
from vlmrlaif_jax.plan import Note, Row, Target

# The estimate may be off: up to here it is left to the compiler to say.
_DOUBT = 1.15


class Way(NamedTuple):
  """One way to run a stage."""

  mesh: dict[str, int]
  microbatches: int  # 0: the stage does not train.

  def flags(self, section: str) -> str:
    """The line to paste into a command."""
    parts = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
    if self.microbatches:
      parts.append(f"--config.{section}.microbatches={self.microbatches}")
    return " ".join(parts)


def sweep(
  config: ConfigDict,
  to: Target,
  stage: str,
  cache: pathlib.Path,
  top: int,
  note: Note,
) -> list[Row]:
  """Ways that fit, the fastest first, each a row of plan.of_stage with its "line".

  Args:
    top: how many are to be found; three times as many are compiled at most.
  """
  section = plan_stages.SECTIONS[plan_stages.split_round(stage)[0]]
  found = list(_estimated(config, to, stage, section, note))
  likely = [(way, row) for way, row in found if _may_fit(row)]
  note(f"{stage}: {len(likely)} of {len(found)} ways may fit {to.topology.name}")
  likely.sort(key=lambda each: each[1]["step_s"])
  rows: list[Row] = []
  for way, guess in likely[: 3 * top]:
    note(f"{stage}: {way.flags(section)}: some {guess['step_s']:.4g} s a step")
    (row,) = plan.plan(_with(config, section, way), to, [stage], cache, note)
    if row["fits"]:
      rows.append({**row, "line": way.flags(section)})
    if len(rows) == top:
      break
  return sorted(rows, key=lambda row: row["step_s"])


def _may_fit(row: Row) -> bool:
  return all(f["estimate"] <= f["limit"] * _DOUBT for f in row["functions"])


def _estimated(config, to, stage, section, note) -> Iterator[tuple[Way, Row]]:
  """Every way that divides everything, with what the shapes say of it."""
  ways_ = list(ways(config, section, len(to.devices)))
  for number, way in enumerate(ways_):
    if number % 50 == 49:
      note(f"{stage}: {number + 1} of {len(ways_)} ways looked at")
    given = _with(config, section, way)
    try:
      mesh = sharding.make_mesh(**way.mesh, devices=to.devices)
      run = plan_run.make(given, mesh)
      if run.policy.llm.kv_heads % mesh.shape["tensor"]:
        continue
      (made,) = plan_stages.of_recipe(run, [stage])
      yield way, plan.of_stage(run, made, to)
    except ValueError:  # A matrix that the mesh does not divide.
      continue


def ways(config: ConfigDict, section: str, devices: int) -> Iterator[Way]:
  """All meshes of so many devices, and all microbatches that divide the rows."""
  given = config[section]
  trains = "microbatches" in given
  prompts = given.batch_size if trains else given.batch
  samples = given.samples if "minibatches" in given else 1
  parts = given.minibatches if "minibatches" in given else 1
  for sizes in topologies.shapes(devices, len(sharding.AXES)):
    mesh = dict(zip(sharding.AXES, sizes, strict=True))
    shards = mesh["data"] * mesh["fsdp"]
    rows = prompts * samples // parts
    if prompts % shards or (prompts * samples) % (parts * shards):
      continue
    for number in _divisors(rows // shards) if trains else [0]:
      yield Way(mesh, number)


def _divisors(count: int) -> Iterator[int]:
  return (n for n in range(1, count + 1) if count % n == 0)


def _with(config: ConfigDict, section: str, way: Way) -> ConfigDict:
  made = config.copy_and_resolve_references()
  made.mesh.update(way.mesh)
  if way.microbatches:
    made[section].microbatches = way.microbatches
  return made


def table(rows: list[Row]) -> str:
  """Ways that fit, as Markdown."""
  if not rows:
    return "Nothing fits: take more chips, fewer frames, or --config.model.quant=nf4."
  lines = [
    "| stage | s a step | tokens/s/chip | MFU | peak, GiB | line |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    peak = max(f["peak"] for f in row["functions"]) / plan.GIB
    lines.append(
      f"| {row['stage']} | {row['step_s']:.4g} | {row['tokens_s_chip']:.4g} "
      f"| {row['mfu']:.1%} | {peak:.2f} | `{row['line']}` |"
    )
  return "\n".join(lines)
