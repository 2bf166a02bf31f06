"""Writes the tables of the faults that tests try into docs/reliability.md.

python -m tools.list_faults
"""

import pathlib

from perf.pages import replace_block
from tests.faults import catalog, tried
from vlmrlaif_jax.core.markdown import markdown_table

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
NAME = "faults, written by tools/list_faults.py"
WORKDIR_TEST = "tests/faults/test_workdir.py"


def main() -> None:
  """Replaces the tables on the page."""
  PAGE.write_text(insert_tables(PAGE.read_text()))


def insert_tables(page: str) -> str:
  """Returns the page with the tables in their block."""
  return replace_block(page, NAME, f"\n{make_tables()}\n")


def make_tables() -> str:
  """Returns a table of the damaged files, and one of all other faults."""
  damaged = [
    (case.fault, _describe_seen(case), case.recovered) for case in catalog.WORKDIR
  ]
  others = [
    (case.fault, case.seen, case.recovered, f"`tests/{case.test}`")
    for case in tried.OTHERS
  ]
  return "\n".join(
    [
      markdown_table(others, ("fault", "seen", "recovered", "test")),
      "",
      f"`{WORKDIR_TEST}` damages each of these files in a finished run, and starts the "
      "run again:",
      "",
      markdown_table(damaged, ("fault", "seen", "recovered")),
    ]
  )


def _describe_seen(case: catalog.Damaged) -> str:
  """Returns the exit code if it is not 0, and the printed line."""
  line = f"`{case.seen}`" if case.seen else "nothing"
  return f"code {case.code}: {line}" if case.code else line


if __name__ == "__main__":
  main()
