"""Draws the packages of vlmrlaif_jax by tier into docs/design.md.

python -m tools.draw_packages

The table has the first line of each package's docstring. tests/test_imports.py checks
that imports follow the tiers.
"""

import ast
import pathlib

TIERS = (  # From the lowest tier. Packages of one tier do not import each other.
  ("core", "losses"),
  ("models", "data", "training"),
  ("sampling", "huggingface", "feedback"),
  ("methods", "evals", "runtime"),
  ("stages", "report"),
  ("planner", "serving"),
  ("recipes",),
)
TIER = {package: tier for tier, names in enumerate(TIERS) for package in names}
NEVER = {  # Libraries that no module of a package imports.
  "losses": {"flax", "optax", "ml_collections"},
  "models": {"optax", "ml_collections"},
  "data": {"jax", "flax", "optax"},
  "report": {"jax", "flax"},
}

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN = "<!-- packages: begin, written by tools/draw_packages.py -->\n"
END = "<!-- packages: end -->\n"
_DOWN = range(len(TIERS), 0, -1)  # Numbers of the tiers, from the highest.


def main() -> None:
  """Replaces the block between the markers of the page."""
  PAGE.write_text(insert_block(PAGE.read_text(), make_block()))


def insert_block(page: str, new: str) -> str:
  """Returns the page with `new` between its markers.

  Raises:
    ValueError: The page does not contain each marker exactly once.
  """
  if page.count(BEGIN) != 1 or page.count(END) != 1:
    raise ValueError(f"the page must contain {BEGIN!r} and {END!r} exactly once")
  before, rest = page.split(BEGIN)
  return before + BEGIN + new + END + rest.split(END)[1]


def make_block() -> str:
  """Returns the picture of the tiers, from the highest, and the table of packages."""
  return "\n".join(["", "```text", *_draw_tiers(), "```", "", *_make_table(), "", ""])


def _draw_tiers() -> list[str]:
  width = max(len(package) for tier in TIERS for package in tier) + 4
  rows = [f"{n}   " + "".join(p.ljust(width) for p in TIERS[n - 1]) for n in _DOWN]
  return [
    row.rstrip()
    for row in ["    configs  examples  launch  perf  tools  tests", "", *rows]
  ]


def _make_table() -> list[str]:
  lines = ["| tier | package | what it holds | never imports |", "|---|---|---|---|"]
  for tier in _DOWN:
    for package in TIERS[tier - 1]:
      never = ", ".join(f"`{library}`" for library in sorted(NEVER.get(package, ())))
      lines.append(f"| {tier} | `{package}/` | {read_purpose(package)} | {never} |")
  return lines


def read_purpose(package: str) -> str:
  """Returns the first line of a package's docstring."""
  path = ROOT / "vlmrlaif_jax" / package / "__init__.py"
  return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


if __name__ == "__main__":
  main()
