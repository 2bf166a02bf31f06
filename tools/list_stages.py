"""Writes the table of all stages into docs/design.md.

python -m tools.list_stages
"""

import pathlib

from perf.pages import replace_block
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.stages.stage import Stage, load_stages

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "design.md"
NAME = "stages, written by tools/list_stages.py"
KINDS = ("trains a policy", "trains", "labels", "measures")
COLUMNS = ("stage", "title", "section", "what it does", "planned", "paper")


def main() -> None:
  """Replaces the table on the page."""
  PAGE.write_text(insert_table(PAGE.read_text()))


def insert_table(page: str) -> str:
  """Returns the page with the table, between blank lines, in its block."""
  return replace_block(page, NAME, f"\n{make_table()}\n")


def make_table() -> str:
  """Returns the table: stages that train first, then labeling and measurement."""
  stages = sorted(
    load_stages().values(), key=lambda stage: KINDS.index(get_kind(stage))
  )
  return markdown_table(map(_make_cells, stages), COLUMNS)


def get_kind(stage: Stage) -> str:
  """Returns which of KINDS a stage is."""
  if stage.trains_policy:
    return "trains a policy"
  if stage.steps:
    return "trains"
  return "measures" if stage.is_measurement else "labels"


def _make_cells(stage: Stage) -> list[str]:
  paper = stage.paper and f"[{stage.paper}](https://arxiv.org/abs/{stage.paper})"
  planned = "yes" if stage.workload else "no"
  names = f"`{stage.name}`", stage.title, f"`{stage.section}`"
  return [*names, get_kind(stage), planned, paper]


if __name__ == "__main__":
  main()
