"""Markdown tables."""

from collections.abc import Iterable


def markdown_table(rows: Iterable[Iterable[object]], columns: Iterable[str]) -> str:
  """Formats a Markdown table.

  >>> print(markdown_table([["a", 1], ["b", 2]], ["name", "count"]))
  | name | count |
  |---|---|
  | a | 1 |
  | b | 2 |

  Args:
    rows: Cells of each row, one per column.
    columns: Names of the columns.

  Raises:
    ValueError: A row has more or fewer cells than there are columns.
  """
  lines = [[str(cell) for cell in row] for row in (columns, *rows)]
  head, *body = lines
  for line in body:
    if len(line) != len(head):
      raise ValueError(f"row {line} must have {len(head)} cells, one per column {head}")
  first, *rest = [f"| {' | '.join(line)} |" for line in lines]
  return "\n".join([first, "|---" * len(head) + "|", *rest])
