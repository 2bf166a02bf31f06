"""Estimates PPO of published families on slices, and writes a table into a document.

JAX_PLATFORMS=cpu python tools/scaling_families.py

Nothing is compiled. The table replaces the text between the two marks in the document.
"""

import os
import pathlib
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Recipes import each other as configs.NAME.

from absl import app, logging  # noqa: E402

from configs.published import PUBLISHED  # noqa: E402
from tools import scaling_docs  # noqa: E402
from tools.scaling import DOC, estimate_point  # noqa: E402
from tools.scaling_points import Point  # noqa: E402
from vlmrlaif_jax.core.markdown import markdown_table  # noqa: E402
from vlmrlaif_jax.planner import topologies  # noqa: E402

SLICES = ("v5e-16", "v5e-64", "v5p-8", "v6e-16", "h200-8", "a100-8")
MARKS = ("<!-- families -->\n", "<!-- end of families -->\n")


def main(argv: list[str]) -> None:
  """Estimates all points and replaces the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  table = markdown_table(
    list(estimate_rows()),
    ["preset", "slice", *scaling_docs.NUMBERS, scaling_docs.MESH],
  )
  path = pathlib.Path(DOC.value)
  path.write_text(replace_marked(path.read_text(), table))


def estimate_rows() -> Iterator[list[str]]:
  """Yields a row for each preset and slice, and prints it."""
  for preset in PUBLISHED:
    for name in SLICES:
      point = Point(f"{preset}_{name}", "ppo", name, {"ppo.batch_size": 256}, preset)
      (plan, *_) = estimate_point(point)
      numbers = scaling_docs.format_numbers(plan)
      row = [preset, name, *numbers, scaling_docs.format_mesh(plan)]
      print(*row, flush=True)
      yield row


def replace_marked(text: str, table: str) -> str:
  """Replaces the text between the marks.

  Raises:
    ValueError: A mark is missing.
  """
  start, end = (text.index(mark) for mark in MARKS)
  return f"{text[: start + len(MARKS[0])]}{table}\n{text[end:]}"


if __name__ == "__main__":
  for topology in SLICES:
    os.environ.update(topologies.make_environment(topologies.parse_topology(topology)))
  app.run(main)
