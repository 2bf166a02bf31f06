"""Writes Markdown."""

from collections.abc import Iterable


def markdown_table(rows: Iterable[Iterable[object]], columns: Iterable[str]) -> str:
  """Returns a table.

  >>> print(markdown_table([["a", 1], ["b", 2]], ["name", "count"]))
  | name | count |
  |---|---|
  | a | 1 |
  | b | 2 |

  Args:
    rows: Cells of each row, as many as there are columns.
    columns: Names in the first line.

  Raises:
    ValueError: A row has more or fewer cells than there are columns.
  """
  lines = [[str(cell) for cell in row] for row in (columns, *rows)]
  head, *body = lines
  for line in body:
    if len(line) != len(head):
      raise ValueError(f"row {line} must have {len(head)} cells, as columns {head}")
  made = [f"| {' | '.join(line)} |" for line in lines]
  return "\n".join([made[0], "|---" * len(head) + "|", *made[1:]])
