"""Plans the 7B recipes on many slices, and writes the results into docs/scaling.md.

nice -n 10 python tools/scaling.py --out=runs/scaling

The program first estimates every point from its shapes, which takes seconds. Then it
compiles each point with launch/plan.py, the most important points first, which takes
hours. Points with a result under --out are skipped, so a killed program can be started
again. The document is written after each point and marks estimates. --nocompile skips
the compilation.
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
from tools.scaling_points import FIRST, Point, list_points  # noqa: E402
from vlmrlaif_jax.core.files import read_json, write_json  # noqa: E402
from vlmrlaif_jax.planner import topologies  # noqa: E402

OUT = flags.DEFINE_string("out", "runs/scaling", "Folder of the results.")
DOC = flags.DEFINE_string("doc", "docs/scaling.md", "Document to write.")
ONLY = flags.DEFINE_string("only", "", "Prefix of the points' names; empty: all.")
COMPILE = flags.DEFINE_bool("compile", True, "Compile points that have no result yet.")


def main(argv: list[str]) -> None:
  """Estimates and compiles the selected points."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  out, doc = pathlib.Path(OUT.value).absolute(), pathlib.Path(DOC.value)
  selected = [point for point in list_points() if point.name.startswith(ONLY.value)]
  write = lambda: scaling_docs.write(doc, read_rows(out))
  for point in selected:
    if not (path := out / "estimates" / f"{point.name}.json").exists():
      print(f"{point.name}: estimate", flush=True)
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json(path, estimate_point(point))
  write()
  if COMPILE.value:
    todo = [p for p in selected if not (out / f"{p.name}.json").exists()]
    compile_all(todo, out, write)


def read_rows(out: pathlib.Path) -> scaling_docs.Rows:
  """Returns the best plan of each point that has one, compiled or estimated."""
  rows = {}
  for point in list_points():
    for path in (out / f"{point.name}.json", out / "estimates" / f"{point.name}.json"):
      if path.exists():
        rows[point.name] = read_json(path)[0]
        break
  return rows


def estimate_point(point: Point) -> list[dict[str, Any]]:
  """Returns the plans of launch/plan.py --sweep --top=0."""
  from configs import prices
  from vlmrlaif_jax.planner import plan, sweep

  target = plan.make_target(point.topology, prices.get_config())
  quiet = lambda line: None
  return sweep.sweep_meshes(
    point.make_config(), target, point.stage, pathlib.Path(), 0, quiet
  )


def compile_all(
  todo: list[Point], out: pathlib.Path, write: Callable[[], None]
) -> None:
  """Compiles points in order and prints a line for each, also after a failure.

  Args:
    todo: Points without a result.
    out: Folder of results, logs and the compilation cache.
    write: Writes the document; called after each point.
  """
  (out / "logs").mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  for number, point in enumerate(todo):
    line = [
      *(sys.executable, str(ROOT / "launch/plan.py"), *point.make_command()),
      *(f"--json={out / point.name}.json", f"--cache={out / 'cache'}"),
    ]
    with (out / "logs" / f"{point.name}.log").open("w") as log:
      done = subprocess.run(line, stdout=log, stderr=log, cwd=ROOT, check=False)
    write()
    minutes = (time.monotonic() - start) / 60
    left = minutes / (number + 1) * (len(todo) - number - 1)
    outcome = {0: "fits", 3: "does not fit"}.get(done.returncode, "FAILED, see its log")
    print(
      f"[{number + 1}/{len(todo)}] {point.name}: {outcome}; {minutes:.0f} min, "
      f"about {left:.0f} min left",
      flush=True,
    )


if __name__ == "__main__":
  for topology in FIRST:  # The variables for a TPU and for a GPU are compatible.
    os.environ.update(topologies.make_environment(topologies.parse_topology(topology)))
  app.run(main)
