"""Predicts the memory, time and cost of a recipe on accelerators, which may be absent.

python launch/plan.py --config=configs/ppo.py:7b --topology=v5e-16 [--stage=ppo]
python launch/plan.py --config=configs/ppo.py:7b --topology=v5e-64 --stage=ppo --sweep
python launch/plan.py --config=configs/ppo.py --topology=cpu-1 --stage=ppo --measure

--config is the recipe, FILE[:PRESET]. Set any value of the recipe with
--config.SECTION.NAME=VALUE, and any price with --prices.chip_hour.NAME=VALUE. See
docs/planning.md.
"""

import itertools
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Recipes import each other as configs.NAME.

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from launch.run import check_overrides, exit_with_error  # noqa: E402
from vlmrlaif_jax.planner import topologies  # noqa: E402

PRICES = config_flags.DEFINE_config_file(
  "prices", str(ROOT / "configs/prices.py"), "File with the prices of chips."
)
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Devices of the plan: v5e-64, v5p-8, h200-8, cpu-1, ..."
)
STAGE = flags.DEFINE_list("stage", [], "Stages to plan; the default is all.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try all meshes and microbatches.")
TOP = flags.DEFINE_integer(
  "top", 3, "Fitting meshes that a sweep compiles; 0 compiles none.", 0
)
MEASURE = flags.DEFINE_bool("measure", False, "Also run the stages on this machine.")
JSON = flags.DEFINE_string("json", "", "Output file for the printed rows, as JSON.")
CACHE = flags.DEFINE_string("cache", "runs/.plan", "Folder of compiled programs.")


def main(argv: list[str]) -> None:
  """Prints the plan, and exits with code 3 if the recipe does not fit."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  from vlmrlaif_jax.core.errors import EXIT_USER_ERROR, UserError
  from vlmrlaif_jax.core.files import write_json

  config = flags.FLAGS.config
  topologies.init_backend()
  from vlmrlaif_jax.planner import abstract_run

  try:
    abstract_run.find_configs(config)
  except (FileNotFoundError, ValueError, UserError) as error:
    exit_with_error(str(error))  # Another mesh would not help.
  try:
    rows = plan_stages(config)
  except (ValueError, ImportError, UserError) as error:
    hint = (
      "" if SWEEP.value else "\n  --sweep tries all meshes that divide the batches."
    )
    print(f"error: {error}{hint}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
  if JSON.value:
    write_json(pathlib.Path(JSON.value), rows)
  fits = any if SWEEP.value else all
  sys.exit(0 if fits(row["fits"] and "misfit" not in row for row in rows) else 3)


def plan_stages(config) -> list[dict]:
  """Prints and returns one row per stage, or one per mesh for a sweep."""
  from perf import calibrate
  from vlmrlaif_jax.planner import plan, sweep
  from vlmrlaif_jax.recipes import runner

  note = lambda line: print(line, file=sys.stderr, flush=True)
  own = TOPOLOGY.value.startswith("cpu")
  chip = calibrate.measure_chip(config, note) if own else None
  target = plan.make_target(TOPOLOGY.value, PRICES.value, chip)
  stages = runner.list_stages(config)
  if unknown := set(STAGE.value) - set(stages):
    raise ValueError(f"--stage must be in {stages}, got {sorted(unknown)}")
  stages = STAGE.value or stages
  cache = pathlib.Path(CACHE.value)
  if SWEEP.value:
    rows = []
    for stage in stages:
      rows += sweep.sweep_meshes(config, target, stage, cache, TOP.value, note)
    print(sweep.format_sweep(rows))
    return rows
  if reason := sweep.find_mesh_error(config, target, stages):
    return suggest_mesh(config, target, stages, reason, note)
  rows = plan.plan_recipe(config, target, stages, cache, note)
  for row in rows:
    print(plan.format_plan(row, PRICES.value.currency) + "\n")
  if MEASURE.value:
    measured = calibrate.measure_stages(config, target, stages, cache, note)
    print(calibrate.format_table(measured))
    rows += measured
  return rows


def suggest_mesh(config, target, stages, reason, note) -> list[dict]:
  """Prints why the recipe's mesh does not fit the topology, and a mesh that does.

  Args:
    config: The recipe.
    target: Topology and prices.
    stages: Stages to plan.
    reason: Why the recipe's mesh does not fit.
    note: Receives lines of progress.

  Returns:
    The rows of the suggested mesh.
  """
  from vlmrlaif_jax.planner import sweep

  line, rows = sweep.find_fitting_mesh(config, target, stages, note)
  print(f"The recipe's mesh does not fit {target.topology.name}: {reason}\n")
  print(sweep.format_sweep(rows))
  print(
    "\nThis is the fastest mesh that fits, by an estimate without compilation. To plan "
    f"or run it, add\n  {line}"
  )
  return [{**row, "misfit": reason} for row in rows]


def set_environment(argv: list[str]) -> None:
  """Sets the environment for --topology, which must precede the import of jax."""
  names = [a.split("=", 1)[1] for a in argv if a.startswith("--topology=")]
  names += [b for a, b in itertools.pairwise(argv) if a == "--topology"]
  if not names:
    return  # The parser of flags reports that --topology is missing.
  try:
    topology = topologies.parse_topology(names[-1])
  except ValueError as error:
    exit_with_error(str(error))
  os.environ.update(topologies.make_environment(topology))


if __name__ == "__main__":
  if len(sys.argv) == 1:
    sys.argv.append("--help")
  set_environment(sys.argv[1:])
  topologies.import_jax()
  flags.mark_flags_as_required(["config", "topology"])
  check_overrides(sys.argv[1:])
  app.run(main)
