"""Plans memory, time and cost of a recipe on a slice of accelerators.

The compiler for the slice compiles every function that the stages jit; nothing runs.
Time is an estimate: a roofline of the chip over the share of its limits that programs
reach. It counts FLOPs and bytes from shapes, and the compiled program's collectives.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.core.types import ModelPass
from vlmrlaif_jax.planner import abstract_run, roofline, topologies
from vlmrlaif_jax.planner import compile as compile_lib
from vlmrlaif_jax.planner import memory as memory_lib
from vlmrlaif_jax.planner.abstract_run import PlannedStage, plan_recipe_stages
from vlmrlaif_jax.planner.collectives import Collective
from vlmrlaif_jax.planner.roofline import Work
from vlmrlaif_jax.planner.topologies import GIB, Chip, Topology
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import DeviceFunction

NoteFn = Callable[[str], None]


class Target(NamedTuple):
  """A slice to plan for, with its limits and prices."""

  topology: Topology
  chip: Chip
  devices: list[jax.Device]
  assumed: ConfigDict  # Prices and reached shares: configs/prices.py.


def make_target(name: str, assumed: ConfigDict, chip: Chip | None = None) -> Target:
  """Creates a target from the public name of a slice.

  Args:
    name: Public name: "v5e-16".
    assumed: Prices and reached shares: configs/prices.py.
    chip: The measured limits of this machine, None for a data sheet's.

  Raises:
    ValueError: The name is of this machine, and `chip` is None.
  """
  topology = topologies.parse_topology(name)
  devices = topologies.get_topology_devices(topology)
  chip = chip or topologies.CHIPS.get(topology.kind)
  if chip is None:
    raise ValueError(f"{name} is this machine, which has no data sheet. Set --measure")
  return Target(topology, chip, devices, assumed)


def plan_recipe(
  config: ConfigDict,
  target: Target,
  stages: Iterable[str],
  cache: pathlib.Path,
  note: NoteFn = print,
) -> list[JsonRow]:
  """Compiles and plans stages. Returns a row for each; see `plan_stage`.

  Args:
    config: A recipe's config.
    target: The slice.
    stages: Names of the stages; those that run nothing on devices are left out.
    cache: Folder of compiled programs' results.
    note: Receives a line of progress.
  """
  return [
    plan_stage(run, stage, target, compiled)
    for run, stage, compiled in compile_stages(config, target, stages, cache, note)
  ]


def compile_stages(
  config: ConfigDict,
  target: Target,
  stages: Iterable[str],
  cache: pathlib.Path,
  note: NoteFn,
) -> Iterator[tuple[Run, PlannedStage, list[list[compile_lib.CompiledProgram]]]]:
  """Yields each stage with the compiled programs of each of its functions."""
  mesh = sharding.make_mesh(**config.mesh, devices=target.devices)
  run = abstract_run.create_abstract_run(config, mesh)
  for stage in plan_recipe_stages(run, stages):
    note(f"{stage.name} on {target.topology.name}")
    compiled = [
      compile_lib.compile_all(run, function, cache, note)
      for function in stage.workload.functions
    ]
    yield run, stage, compiled


def plan_stage(
  run: Run,
  stage: PlannedStage,
  target: Target,
  compiled: list[list[compile_lib.CompiledProgram]] | None = None,
) -> JsonRow:
  """Returns the memory, time and cost of a stage, with a row for each function.

  Args:
    run: A run of shapes.
    stage: The stage.
    target: The slice.
    compiled: Compiled programs of each function, None to estimate from shapes.
  """
  functions = [
    _plan_function(run, stage, function, target, compiled and compiled[i])
    for i, function in enumerate(stage.workload.functions)
  ]
  step = sum(f["runs"] * f["seconds"] for f in functions)
  chips, steps = target.topology.chips, stage.workload.steps
  peak = target.chip.flops * chips
  model = sum(f["runs"] * f["model_flops"] for f in functions)
  hours = steps * step * chips / 3600
  price = target.assumed.chip_hour.get(target.topology.kind, 0.0)
  return {
    "stage": stage.name,
    "topology": target.topology.name,
    "mesh": dict(run.mesh.shape),
    "fits": all(f["fits"] for f in functions),
    "steps": steps,
    "rows": stage.workload.rows,
    "step_s": step,
    "tokens_s_chip": stage.workload.tokens / step / chips,
    "mfu": model / step / peak,
    "chip_hours": hours,
    "cost": hours * price,
    "functions": functions,
    "note": stage.workload.note,
    "advice": "\n".join(f["advice"] for f in functions if f["advice"]),
  }


def _plan_function(
  run, stage: PlannedStage, function: DeviceFunction, target: Target, compiled
) -> JsonRow:
  memory = memory_lib.estimate_memory(run, stage, function)
  programs = compiled or [None] * len(function.passes)
  passes = list(function.passes.values())
  phases: list[JsonRow] = []
  for i, program in enumerate(programs):
    named = function.passes.get(program.name) if program else passes[i]
    # A function that is itself jitted has one list of passes, under another name.
    phases += _plan_phases(run, function, named or passes[0], target, program)
  peaks = [memory_lib.count_peak_bytes(run, stage, function, p) for p in programs if p]
  peak = max(peaks, default=memory.peak)
  limit = target.chip.memory
  fits = peak <= limit * (1 - memory_lib.HEADROOM)
  advice = f"  {stage.name}: {function.name} does not fit. Estimated memory:\n"
  advice += memory_lib.list_advice(run, stage.name, memory)
  return {
    "function": function.name,
    "runs": function.runs,
    "weights": memory.weights,
    "optimiser": memory.optimizer,
    "cache": memory.cache,
    "estimate": memory.peak,
    "peak": peak,
    "limit": limit,
    "fits": fits,
    "advice": "" if fits else advice,
    "refused": " ".join(p.refused for p in programs if p and p.refused),
    "compile_s": sum(p.seconds for p in programs if p),
    "seconds": sum(p["predicted"] for p in phases),
    "model_flops": sum(p["model_flops"] for p in phases),
    "flops": sum(p["flops"] for p in phases),
    "bytes": sum(p["bytes"] for p in phases),
    "collectives": [each._asdict() for p in programs if p for each in _merge(p)],
    "phases": phases,
  }


def _merge(program: compile_lib.CompiledProgram) -> list[Collective]:
  """Merges a program's collectives of the same kind, group and loop."""
  merged: dict[Any, Collective] = {}
  for each in program.collectives:
    key = each.kind, each.group, each.loop
    before = merged.get(key, each._replace(bytes=0.0, runs=0.0))
    merged[key] = each._replace(
      bytes=before.bytes + each.bytes, runs=before.runs + each.runs
    )
  return sorted(merged.values(), key=lambda each: -each.bytes)


def _plan_phases(
  run, function, passes: list[ModelPass], target: Target, program
) -> list[JsonRow]:
  """Returns a row of work and time for each pass of a program."""
  split = roofline.get_mesh_split(run.mesh)
  works = [
    roofline.compute_work(p, _count_layer_bytes(function, p), split) for p in passes
  ]
  if program is not None and not program.refused:
    works = _apply_compiled_counts(passes, works, program)
  hosts = -(-target.topology.chips // topologies.HOST_GPUS)
  # The limits of a CPU are measured, so programs reach all of them.
  reached, rows = {} if target.chip.host else dict(target.assumed.reached), []
  for each, work in zip(passes, works, strict=True):
    limit = roofline.estimate_seconds(work, target.chip, hosts=hosts)
    predicted = roofline.TimeEstimate(
      *(t / reached.get(n, 1.0) for n, t in limit._asdict().items())
    )
    rows.append(
      {
        "phase": each.phase,
        "role": each.role,
        "model_flops": roofline.count_pass_flops(each).model,
        "flops": roofline.count_pass_flops(each).hardware,
        "bytes": work.bytes,  # Per device, like the values below.
        "moved": work.received_bytes,
        "roofline": limit.seconds,
        "bound": limit.bound,
        "predicted": predicted.seconds,
      }
    )
  return rows


def _count_layer_bytes(function: DeviceFunction, p: ModelPass) -> float:
  """Counts the stored bytes of a role's layers, on all devices together."""
  if p.phase == "encode":
    return 0.0
  tree = function.roles[p.role]
  parts = [tree[name]["llm"]["blocks"] for name in ("params", "quant") if name in tree]
  return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts)))


def _apply_compiled_counts(
  passes: list[ModelPass], works: list[Work], program: compile_lib.CompiledProgram
) -> list[Work]:
  """Returns the work with the compiled program's collectives and allocations.

  Decoding has the collectives of its loop. Other passes share the rest in proportion
  to their FLOPs. If prompts are read inside the loop, collectives stay estimates: the
  compiler does not report how often the reads run.
  """
  share = program.allocated_bytes / sum(w.flops for w in works)
  works = [w._replace(allocated_bytes=share * w.flops) for w in works]
  if any(_is_decode(each) and each.parts > 1 for each in passes):
    return works
  total = lambda inside: (
    sum(c.bytes for c in program.collectives if bool(c.loop) == inside),
    sum(c.runs for c in program.collectives if bool(c.loop) == inside),
  )
  others = sum(w.flops for p, w in zip(passes, works, strict=True) if not _is_decode(p))
  updated = []
  for each, work in zip(passes, works, strict=True):
    share = 1.0 if _is_decode(each) else work.flops / others
    received, messages = total(_is_decode(each))
    updated.append(
      work._replace(received_bytes=received * share, messages=messages * share)
    )
  return updated


def _is_decode(p: ModelPass) -> bool:
  return p.phase == "decode"


# Reports.


def format_plan(row: JsonRow, currency: str) -> str:
  """Formats a stage's row as Markdown.

  Args:
    row: A row of `plan_stage`.
    currency: Currency of the prices, such as "USD".
  """
  mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
  head = f"{row['stage']} on {row['topology']}, mesh {mesh}: "
  head += "fits" if row["fits"] else "DOES NOT FIT"
  tables = _format_memory(row["functions"]), _format_times(row["functions"])
  more = [line for line in (row["note"], row["advice"]) if line]
  lines = [*_format_collectives(row), _format_summary(row, currency), *more]
  return "\n\n".join([head, *tables, "\n".join(lines)])


def _format_memory(functions: list[JsonRow]) -> str:
  rows = []
  for f in functions:
    own = {role: x for role, x in f["weights"].items() if x > 0.005 * f["peak"]}
    weights = ", ".join(f"{role} {_format_gib(x)}" for role, x in own.items())
    mark = "" if f["fits"] else " **does not fit**"
    rows.append(
      [
        f["function"],
        weights,
        _format_gib(f["optimiser"]),
        _format_gib(f["cache"]),
        f"{_format_gib(f['peak'])}{mark}",
        _format_gib(f["limit"]),
        f"{f['compile_s']:.0f}",
      ]
    )
  columns = ["function", "weights, GiB", "trained, GiB", "cache, GiB", "peak, GiB"]
  return markdown_table(rows, [*columns, "memory, GiB", "compiled in, s"])


def _format_times(functions: list[JsonRow]) -> str:
  rows = [
    [
      f["function"],
      f"{p['phase']} {p['role']}",
      f"{p['flops'] / 1e12:.4g}",
      f"{p['bytes'] / 1e9:.4g}",
      f"{p['moved'] / 1e9:.3g}",
      f"{p['roofline']:.4g}",
      p["bound"],
      f"{p['predicted']:.4g}",
      f"{f['runs']:g}",
    ]
    for f in functions
    for p in f["phases"]
  ]
  columns = ["function", "pass", "TFLOP", "GB in memory", "GB received"]
  columns += ["roofline, s", "bound by", "estimate, s", "runs a step"]
  return markdown_table(rows, columns)


def _format_gib(size: float) -> str:
  return f"{size / GIB:.3g}"


def _format_collectives(row: JsonRow) -> list[str]:
  return [
    f"  {f['function']}: "
    + "; ".join(
      f"{c['kind']} over {c['group']}{' (' + c['loop'] + ')' if c['loop'] else ''} "
      f"{c['bytes'] / 1e9:.3g} GB in {c['runs']:.0f}"
      for c in f["collectives"][:6]
    )
    for f in row["functions"]
    if f["collectives"]
  ]


def _format_summary(row: JsonRow, currency: str) -> str:
  line = (
    f"  Estimate: {row['step_s']:.4g} s for a step of {row['rows']} rows, "
    f"{row['tokens_s_chip']:.4g} tokens/s/chip, MFU {row['mfu']:.1%}"
  )
  if row["steps"]:
    line += f"; {row['chip_hours']:.4g} chip-hours for {row['steps']} steps"
    line += f", {row['cost']:,.0f} {currency} at list price" if row["cost"] else ""
  return line
