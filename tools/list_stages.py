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
  PAGE.write_text(with_table(PAGE.read_text()))


def with_table(page: str) -> str:
  """Returns the page with the table, between blank lines, in its block."""
  return replace_block(page, NAME, f"\n{table()}\n")


def table() -> str:
  """Returns the table: stages that train first, then labeling and measurement."""
  stages = sorted(load_stages().values(), key=lambda stage: KINDS.index(kind_of(stage)))
  return markdown_table(map(_cells, stages), COLUMNS)


def kind_of(stage: Stage) -> str:
  """Returns which of KINDS a stage is."""
  if stage.trains_policy:
    return "trains a policy"
  if stage.steps:
    return "trains"
  return "measures" if stage.is_measurement else "labels"


def _cells(stage: Stage) -> list[str]:
  paper = stage.paper and f"[{stage.paper}](https://arxiv.org/abs/{stage.paper})"
  planned = "yes" if stage.workload else "no"
  names = f"`{stage.name}`", stage.title, f"`{stage.section}`"
  return [*names, kind_of(stage), planned, paper]


if __name__ == "__main__":
  main()
