"""Two results of a benchmark side by side: launch/compare.py A B.

Each is a scores.json, or the folder that holds it: WORKDIR/benchmarks/NAME/POLICY. What
differs in how they were made is warned of, for it moves scores by itself.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any


def main(given: list[str]) -> None:
  if len(given) != 2 or "--help" in given:
    sys.exit(__doc__)
  first, second = (read(pathlib.Path(name)) for name in given)
  rows = [["", *given]]
  for name in merged(first["scores"], second["scores"]):
    rows.append([name, *(said(side["scores"].get(name)) for side in (first, second))])
  for name in merged(first["counts"], second["counts"]):
    rows.append([name, *(str(side["counts"].get(name, 0)) for side in (first, second))])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    print(
      "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
    )
  for key, a, b in differences(first["recipe"], second["recipe"]):
    print(f"warning: {key} differs: {a!r} in A, {b!r} in B")


def read(path: pathlib.Path) -> dict[str, Any]:
  file = path if path.suffix == ".json" else path / "scores.json"
  if not file.exists():
    sys.exit(f"error: no {file}: run the stage benchmarks there, see configs/benchmarks.py")
  return json.loads(file.read_text())


def merged(first: dict, second: dict) -> list[str]:
  """The keys of both, each once."""
  return list(dict.fromkeys([*first, *second]))


def said(stat: dict | None) -> str:
  """A mean and its interval."""
  if stat is None:
    return "not measured"
  return f"{stat['mean']:.3f} [{stat['low']:.3f}, {stat['high']:.3f}] of {stat['n']}"


def differences(
  first: Any, second: Any, at: str = ""
) -> Iterator[tuple[str, Any, Any]]:
  """(entry, A's, B's) of each entry of the recipes that is not the same."""
  if isinstance(first, dict) and isinstance(second, dict):
    for key in merged(first, second):
      where = f"{at}.{key}" if at else key
      yield from differences(first.get(key), second.get(key), where)
  elif first != second:
    yield at, first, second


if __name__ == "__main__":
  main(sys.argv[1:])
