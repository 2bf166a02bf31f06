"""Plans the 7B recipes on many slices, and writes docs/scaling.md of what came out.

nice -n 10 python tools/scaling.py --out=runs/scaling

Every point is first planned by its shapes alone, which takes seconds. Then each is
compiled by a run of launch/plan.py, one at a time, those that matter most first: hours
in all. What is there, under --out, is not done again, so what was killed goes on; the
document is written after each point, and says which are compiled. --nocompile leaves
it at what there is, and estimates.
"""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Recipes import each other as configs.NAME.

from absl import app, flags, logging  # noqa: E402

from tools import scaling_docs  # noqa: E402
from tools.scaling_points import FIRST, Point, points  # noqa: E402
from vlmrlaif_jax.core.files import read_json, write_json  # noqa: E402
from vlmrlaif_jax.planner import topologies  # noqa: E402

OUT = flags.DEFINE_string("out", "runs/scaling", "Keeps the points.")
DOC = flags.DEFINE_string("doc", "docs/scaling.md", "Gets the tables.")
ONLY = flags.DEFINE_string("only", "", "Points whose names begin so.")
COMPILE = flags.DEFINE_bool("compile", True, "Compile points that are not there yet.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  out, doc = pathlib.Path(OUT.value).absolute(), pathlib.Path(DOC.value)
  wanted = [point for point in points() if point.name.startswith(ONLY.value)]
  write = lambda: scaling_docs.write(doc, read(out))
  for point in wanted:
    if not (path := out / "estimates" / f"{point.name}.json").exists():
      print(f"{point.name}: by its shapes", flush=True)
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json(path, estimated(point))
  write()
  if COMPILE.value:
    todo = [p for p in wanted if not (out / f"{p.name}.json").exists()]
    compile_all(todo, out, write)


def read(out: pathlib.Path) -> scaling_docs.Rows:
  """The best way to run each point, as far as there is one."""
  rows = {}
  for point in points():
    for path in (out / f"{point.name}.json", out / "estimates" / f"{point.name}.json"):
      if path.exists():
        rows[point.name] = read_json(path)[0]
        break
  return rows


def estimated(point: Point) -> list[dict[str, Any]]:
  """What launch/plan.py --sweep --top=0 has."""
  from configs import prices
  from vlmrlaif_jax.planner import plan, sweep

  to = plan.make_target(point.topology, prices.get_config())
  quiet = lambda line: None
  return sweep.sweep_meshes(point.config(), to, point.stage, pathlib.Path(), 0, quiet)


def compile_all(
  todo: list[Point], out: pathlib.Path, write: Callable[[], None]
) -> None:
  """Runs points, one after the other; tells of each, and goes on after a failure.

  Args:
    todo: points without a result.
    out: the folder of results, logs and the compilation cache.
    write: the document, after each point.
  """
  (out / "logs").mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  for number, point in enumerate(todo):
    line = [
      *(sys.executable, str(ROOT / "launch/plan.py"), *point.command()),
      *(f"--json={out / point.name}.json", f"--cache={out / 'cache'}"),
    ]
    with (out / "logs" / f"{point.name}.log").open("w") as log:
      done = subprocess.run(line, stdout=log, stderr=log, cwd=ROOT, check=False)
    write()
    minutes = (time.monotonic() - start) / 60
    left = minutes / (number + 1) * (len(todo) - number - 1)
    what = {0: "fits", 3: "does not fit"}.get(done.returncode, "FAILED, see its log")
    print(
      f"[{number + 1}/{len(todo)}] {point.name}: {what}; {minutes:.0f} min, some "
      f"{left:.0f} to go",
      flush=True,
    )


if __name__ == "__main__":
  for topology in FIRST:  # A TPU's and a GPU's; they do not contradict each other.
    os.environ.update(topologies.make_environment(topologies.parse_topology(topology)))
  app.run(main)
