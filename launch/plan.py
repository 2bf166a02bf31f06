"""Will it fit, how fast, at what cost, on accelerators that need not be there.

python launch/plan.py --config=configs/ppo.py:7b --topology=v5e-16 [--stage=ppo]
python launch/plan.py --config=configs/ppo.py:7b --topology=v5e-64 --stage=ppo --sweep
python launch/plan.py --config=configs/ppo.py --topology=cpu-1 --stage=ppo --measure

Any setting of the recipe can be given as --config.SECTION.NAME=VALUE, any price as
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
STAGE = flags.DEFINE_list("stage", [], "Of the recipe; all of them unless given.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try all meshes and microbatches.")
TOP = flags.DEFINE_integer("top", 3, "How many a sweep is to find; 0: compile none.", 0)
MEASURE = flags.DEFINE_bool("measure", False, "Also run it, on the devices there are.")
JSON = flags.DEFINE_string("json", "", "Gets the rows of all that is printed.")
CACHE = flags.DEFINE_string("cache", "runs/.plan", "Keeps what has been compiled.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  from vlmrlaif_jax.core.errors import EXIT_USER_ERROR, UserError
  from vlmrlaif_jax.core.files import write_json

  config = flags.FLAGS.config
  try:
    rows = run(config)
  except (ValueError, ImportError, UserError) as error:
    hint = "" if SWEEP.value else "\n  With --sweep, all meshes that divide are tried."
    print(f"error: {error}{hint}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
  if JSON.value:
    write_json(pathlib.Path(JSON.value), rows)
  fits = any if SWEEP.value else all
  sys.exit(0 if fits(row["fits"] and "misfit" not in row for row in rows) else 3)


def run(config) -> list[dict]:
  """Prints, and returns, a row for each stage, or for each way to run one."""
  from perf import calibrate
  from vlmrlaif_jax.planner import plan, sweep
  from vlmrlaif_jax.recipes import runner

  note = lambda line: print(line, file=sys.stderr, flush=True)
  own = TOPOLOGY.value.startswith("cpu")
  chip = calibrate.chip(config, note) if own else None
  to = plan.make_target(TOPOLOGY.value, PRICES.value, chip)
  stages = runner.list_stages(config)
  if unknown := set(STAGE.value) - set(stages):
    raise ValueError(f"--stage must be of {stages}, not {sorted(unknown)}")
  stages = STAGE.value or stages
  cache = pathlib.Path(CACHE.value)
  if SWEEP.value:
    rows = []
    for stage in stages:
      rows += sweep.sweep_meshes(config, to, stage, cache, TOP.value, note)
    print(sweep.format_sweep(rows))
    return rows
  if why := sweep.find_mesh_error(config, to, stages):
    return instead(config, to, stages, why, note)
  rows = plan.plan_recipe(config, to, stages, cache, note)
  for row in rows:
    print(plan.format_plan(row) + "\n")
  if MEASURE.value:
    measured = calibrate.measure(config, to, stages, cache, note)
    print(calibrate.table(measured))
    rows += measured
  return rows


def instead(config, to, stages, why, note) -> list[dict]:
  """Prints why the recipe's mesh will not do, and one that would; its rows."""
  from vlmrlaif_jax.planner import sweep

  line, rows = sweep.find_fitting_mesh(config, to, stages, note)
  print(f"The recipe's mesh does not do for {to.topology.name}: {why}\n")
  print(sweep.format_sweep(rows))
  print(
    f"\nOf the meshes that do, this is the fastest that fits, by estimate; nothing was "
    f"compiled. To have it planned, or run, add\n  {line}"
  )
  return [{**row, "misfit": why} for row in rows]


def prepare(argv: list[str]) -> None:
  """Sets the environment for the topology that is asked for, if it is one.

  It has to be there before jax is imported, as recipes do.
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
