"""Two results of a benchmark side by side: tools/compare_benchmarks.py A B.

Each is the folder WORKDIR/benchmarks/NAME/POLICY. The difference is of the cases that
both have, one by one. What differs in how they were made is warned of, for it moves
scores by itself.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmrlaif_jax.core.jsonl import read_jsonl  # noqa: E402
from vlmrlaif_jax.evals import paired_difference  # noqa: E402


def main(given: list[str]) -> None:
  if len(given) != 2 or "--help" in given:
    sys.exit(__doc__)
  folders = [pathlib.Path(name) for name in given]
  first, second = (read(folder) for folder in folders)
  cases = [read_jsonl(folder / "rows.jsonl") for folder in folders]
  rows = [["", *given, "B - A"]]
  for name in merged(first["scores"], second["scores"]):
    sides = [said(side["scores"].get(name)) for side in (first, second)]
    change = paired_difference.difference(*cases, name)
    rows.append([name, *sides, said(change and change._asdict())])
  for name in merged(first["counts"], second["counts"]):
    sides = [str(side["counts"].get(name, 0)) for side in (first, second)]
    rows.append([name, *sides, ""])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    print(
      "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
    )
  for key, a, b in differences(first["recipe"], second["recipe"]):
    print(f"warning: {key} differs: {a!r} in A, {b!r} in B")


def read(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / "scores.json"
  if not file.exists():
    sys.exit(f"error: no {file}: run configs/benchmarks.py there")
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
