"""Plans memory, time and cost of a recipe on accelerators of another machine.

python launch/plan.py --config=configs/ppo.py:7b --topology=v5e-16 [--stage=ppo]
python launch/plan.py --config=configs/ppo.py:7b --topology=v5e-64 --stage=ppo --sweep
python launch/plan.py --config=configs/ppo.py --topology=cpu-1 --stage=ppo --measure

Set any setting of the recipe with --config.SECTION.NAME=VALUE, and any price with
--prices.chip_hour.NAME=VALUE. See docs/planning.md.
"""

import itertools
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Recipes import each other as configs.NAME.

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from launch.run import check_overrides  # noqa: E402
from vlmrlaif_jax.planner import topologies  # noqa: E402

PRICES = config_flags.DEFINE_config_file("prices", str(ROOT / "configs/prices.py"))
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e-64, v5p-8, h200-8, cpu-1, ...")
STAGE = flags.DEFINE_list("stage", [], "Stages to plan; default: all of the recipe.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try all meshes and microbatches.")
TOP = flags.DEFINE_integer("top", 3, "Meshes that --sweep finds; 0 compiles none.", 0)
MEASURE = flags.DEFINE_bool("measure", False, "Also time the plan on this machine.")
JSON = flags.DEFINE_string("json", "", "JSON file to write the printed rows to.")
CACHE = flags.DEFINE_string("cache", "runs/.plan", "Folder of compilation results.")


def main(argv: list[str]) -> None:
  """Prints plans; exits with code 3 if one does not fit."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  from vlmrlaif_jax.core.errors import EXIT_USER_ERROR, UserError
  from vlmrlaif_jax.core.files import write_json

  config = flags.FLAGS.config
  try:
    rows = run(config)
  except (ValueError, ImportError, UserError) as error:
    hint = "" if SWEEP.value else "\n  Run with --sweep to try all meshes."
    print(f"error: {error}{hint}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
  if JSON.value:
    write_json(pathlib.Path(JSON.value), rows)
  fits = any if SWEEP.value else all
  sys.exit(0 if fits(row["fits"] and "misfit" not in row for row in rows) else 3)


def run(config) -> list[dict]:
  """Prints and returns a row for each stage, or for each configuration of a sweep."""
  from perf import calibrate
  from vlmrlaif_jax.planner import plan, sweep
  from vlmrlaif_jax.recipes import runner

  note = lambda line: print(line, file=sys.stderr, flush=True)
  is_own = TOPOLOGY.value.startswith("cpu")
  chip = calibrate.measure_chip(config, note) if is_own else None
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
  """Prints why the slice cannot have the recipe's mesh, and one that fits."""
  from vlmrlaif_jax.planner import sweep

  line, rows = sweep.find_fitting_mesh(config, target, stages, note)
  print(f"{target.topology.name} cannot have the recipe's mesh: {reason}\n")
  print(sweep.format_sweep(rows))
  print(
    "\nThis is the fastest mesh that fits, by estimate. To plan or run it, add\n  "
    f"{line}"
  )
  return [{**row, "misfit": reason} for row in rows]


def prepare(argv: list[str]) -> None:
  """Sets the environment for --topology.

  Call it before recipes are loaded: they import jax, which reads the environment.
  """
  chosen = [a.split("=", 1)[1] for a in argv if a.startswith("--topology=")]
  chosen += [b for a, b in itertools.pairwise(argv) if a == "--topology"]
  try:
    os.environ.update(
      topologies.make_environment(topologies.parse_topology("".join(chosen[-1:])))
    )
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  prepare(sys.argv[1:])
  flags.mark_flags_as_required(["config", "topology"])
  check_overrides(sys.argv[1:])
  app.run(main)
