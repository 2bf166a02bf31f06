"""PROGRAM: will a recipe fit a slice of accelerators, how fast, at what cost.

Every function that its stages jit is compiled for the slice, by the compiler that a run
there would use; nothing of it is executed. Time is what the chip's own limits allow
(its roofline), by operations and bytes counted from the models' shapes and the
collectives that the compiler put in, over the shares of those limits that programs
reach.
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
  """What is planned for, and at what price."""

  topology: Topology
  chip: Chip
  devices: list[jax.Device]
  assumed: ConfigDict  # configs/prices.py.


def make_target(name: str, assumed: ConfigDict, chip: Chip | None = None) -> Target:
  """A slice by its public name.

  Args:
    chip: as measured, for this machine's own.

  Raises:
    ValueError: it is of this machine, which has no data sheet, and was not measured.
  """
  topology = topologies.parse_topology(name)
  devices = topologies.get_topology_devices(topology)
  chip = chip or topologies.CHIPS.get(topology.kind)
  if chip is None:
    raise ValueError(f"{name} is this machine: measure it, with --measure")
  return Target(topology, chip, devices, assumed)


def plan_recipe(
  config: ConfigDict,
  to: Target,
  stages: Iterable[str],
  cache: pathlib.Path,
  note: NoteFn = print,
) -> list[JsonRow]:
  """A row for each stage that compiles anything; see `of_stage`.

  Args:
    cache: the folder of what was compiled before.
    note: takes lines that tell how far it is.
  """
  return [
    plan_stage(run, stage, to, compiled)
    for run, stage, compiled in compile_stages(config, to, stages, cache, note)
  ]


def compile_stages(
  config: ConfigDict,
  to: Target,
  stages: Iterable[str],
  cache: pathlib.Path,
  note: NoteFn,
) -> Iterator[tuple[Run, PlannedStage, list[list[compile_lib.CompiledProgram]]]]:
  """The stages with what the compiler says of each function's programs."""
  mesh = sharding.make_mesh(**config.mesh, devices=to.devices)
  run = abstract_run.create_abstract_run(config, mesh)
  for stage in plan_recipe_stages(run, stages):
    note(f"{stage.name} on {to.topology.name}")
    compiled = [
      compile_lib.compile_all(run, function, cache, note)
      for function in stage.workload.functions
    ]
    yield run, stage, compiled


def plan_stage(
  run: Run,
  stage: PlannedStage,
  to: Target,
  compiled: list[list[compile_lib.CompiledProgram]] | None = None,
) -> JsonRow:
  """What a stage takes: a row for each function, and what follows for its run.

  Args:
    compiled: what the compiler says of each function's programs; None: estimates
      stand for it.
  """
  functions = [
    _of_function(run, stage, function, to, compiled and compiled[i])
    for i, function in enumerate(stage.workload.functions)
  ]
  step = sum(f["runs"] * f["seconds"] for f in functions)
  chips, steps = to.topology.chips, stage.workload.steps
  peak = to.chip.flops * chips
  model = sum(f["runs"] * f["model_flops"] for f in functions)
  hours = steps * step * chips / 3600
  price = to.assumed.chip_hour.get(to.topology.kind, 0.0)
  return {
    "stage": stage.name,
    "topology": to.topology.name,
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


def _of_function(
  run, stage: PlannedStage, function: DeviceFunction, to: Target, compiled
) -> JsonRow:
  memory = memory_lib.estimate_memory(run, stage, function)
  programs = compiled or [None] * len(function.passes)
  passes = list(function.passes.values())
  phases: list[JsonRow] = []
  for i, program in enumerate(programs):
    found = function.passes.get(program.name) if program else passes[i]
    # A program that is jitted by itself goes by the function's name.
    phases += _phases(run, function, found or passes[0], to, program)
  peaks = [memory_lib.peak_device_bytes(run, stage, function, p) for p in programs if p]
  peak = max(peaks, default=memory.peak)
  limit = to.chip.memory
  fits = peak <= limit * (1 - memory_lib.HEADROOM)
  told = f"  {stage.name}: {function.name} does not fit; by estimate it holds\n"
  told += memory_lib.list_advice(run, stage.name, memory)
  return {
    "function": function.name,
    "runs": function.runs,
    "weights": memory.weights,
    "optimiser": memory.optimiser,
    "cache": memory.cache,
    "estimate": memory.peak,
    "peak": peak,
    "limit": limit,
    "fits": fits,
    "advice": "" if fits else told,
    "refused": " ".join(p.refused for p in programs if p and p.refused),
    "compile_s": sum(p.seconds for p in programs if p),
    "seconds": sum(p["predicted"] for p in phases),
    "model_flops": sum(p["model_flops"] for p in phases),
    "flops": sum(p["flops"] for p in phases),
    "bytes": sum(p["bytes"] for p in phases),
    "collectives": [each._asdict() for p in programs if p for each in _joined(p)],
    "phases": phases,
  }


def _joined(program: compile_lib.CompiledProgram) -> list[Collective]:
  """Its collectives, those of one kind, group and loop as one."""
  found: dict[Any, Collective] = {}
  for each in program.collectives:
    key = each.kind, each.group, each.loop
    before = found.get(key, each._replace(bytes=0.0, runs=0.0))
    found[key] = each._replace(
      bytes=before.bytes + each.bytes, runs=before.runs + each.runs
    )
  return sorted(found.values(), key=lambda each: -each.bytes)


def _phases(
  run, function, passes: list[ModelPass], to: Target, program
) -> list[JsonRow]:
  """A row for each pass: what it works, and how long that takes."""
  ways = roofline.get_mesh_split(run.mesh)
  works = [roofline.compute_work(p, _held(function, p), ways) for p in passes]
  if program is not None and not program.refused:
    works = _as_compiled(passes, works, program)
  hosts = -(-to.topology.chips // topologies.HOST_GPUS)
  # What programs reach is assumed, but of a CPU, where it is measured.
  reached, rows = {} if to.chip.host else dict(to.assumed.reached), []
  for each, work in zip(passes, works, strict=True):
    least = roofline.estimate_seconds(work, to.chip, hosts=hosts)
    likely = roofline.TimeEstimate(
      *(t / reached.get(n, 1.0) for n, t in least._asdict().items())
    )
    rows.append(
      {
        "phase": each.phase,
        "role": each.role,
        "model_flops": roofline.count_pass_flops(each).model,
        "flops": roofline.count_pass_flops(each).hardware,
        "bytes": work.bytes,  # Of a device, as those below.
        "moved": work.moved,
        "roofline": least.longest,
        "bound": least.bound,
        "predicted": likely.longest,
      }
    )
  return rows


def _held(function: DeviceFunction, of: ModelPass) -> float:
  """Bytes of a role's layers, as they are held, on all devices together."""
  if of.phase == "encode":
    return 0.0
  tree = function.roles[of.role]
  parts = [tree[name]["llm"]["blocks"] for name in ("params", "quant") if name in tree]
  return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts)))


def _as_compiled(
  passes: list[ModelPass], works: list[Work], program: compile_lib.CompiledProgram
) -> list[Work]:
  """The work with the collectives that the compiler put in, in place of the model's:
  those of the loop that decodes are its own, of the others each pass has a share, as
  of the memory that the program is given.

  Where prompts are read in that loop, the compiler does not know how often.
  """
  share = program.fresh / sum(w.flops for w in works)
  works = [w._replace(fresh=share * w.flops) for w in works]
  if any(_decodes(each) and each.parts > 1 for each in passes):
    return works
  total = lambda inside: (
    sum(c.bytes for c in program.collectives if bool(c.loop) == inside),
    sum(c.runs for c in program.collectives if bool(c.loop) == inside),
  )
  others = sum(w.flops for p, w in zip(passes, works, strict=True) if not _decodes(p))
  made = []
  for each, work in zip(passes, works, strict=True):
    share = 1.0 if _decodes(each) else work.flops / others
    moved, messages = total(_decodes(each))
    made.append(work._replace(moved=moved * share, messages=messages * share))
  return made


def _decodes(of: ModelPass) -> bool:
  return of.phase == "decode"


# For people.


def format_plan(row: JsonRow) -> str:
  """A stage's row as Markdown."""
  mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
  head = f"{row['stage']} on {row['topology']}, mesh {mesh}: "
  head += "fits" if row["fits"] else "DOES NOT FIT"
  tables = _memory_table(row["functions"]), _time_table(row["functions"])
  more = [line for line in (row["note"], row["advice"]) if line]
  lines = [*_collective_lines(row), _summary(row), *more]
  return "\n\n".join([head, *tables, "\n".join(lines)])


def _memory_table(functions: list[JsonRow]) -> str:
  rows = []
  for f in functions:
    own = {role: x for role, x in f["weights"].items() if x > 0.005 * f["peak"]}
    held = ", ".join(f"{role} {_gib(x)}" for role, x in own.items())
    mark = "" if f["fits"] else " **does not fit**"
    rows.append(
      [
        f["function"],
        held,
        _gib(f["optimiser"]),
        _gib(f["cache"]),
        f"{_gib(f['peak'])}{mark}",
        _gib(f["limit"]),
        f"{f['compile_s']:.0f}",
      ]
    )
  columns = ["function", "weights", "trained", "cache", "peak, GiB of", "memory"]
  return markdown_table(rows, [*columns, "compiled in, s"])


def _time_table(functions: list[JsonRow]) -> str:
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
  columns = ["function", "does", "TFLOP", "GB moved in memory", "GB received"]
  columns += ["at the limit, s", "bound by", "likely, s", "times a step"]
  return markdown_table(rows, columns)


def _gib(size: float) -> str:
  return f"{size / GIB:.3g}"


def _collective_lines(row: JsonRow) -> list[str]:
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


def _summary(row: JsonRow) -> str:
  line = (
    f"  a step of {row['rows']}: {row['step_s']:.4g} s, "
    f"{row['tokens_s_chip']:.4g} tokens/s/chip, MFU {row['mfu']:.1%}"
  )
  if row["steps"]:
    line += f"; {row['steps']} steps: {row['chip_hours']:.4g} chip-hours"
    line += f", {row['cost']:,.0f} at list price" if row["cost"] else ""
  return line
