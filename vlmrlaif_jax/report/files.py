"""What a report reads: the files that stages leave."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vlmrlaif_jax.evals.summary import is_number

Row: TypeAlias = dict[str, Any]


def read_json(path: Path) -> Row:
  """The object in a JSON file; empty where there is none."""
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}): run its stage again") from error


def read_lines(path: Path) -> list[Row]:
  """The rows of a JSONL file, less a last line that is still being written."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")[:-1]
  return [json.loads(line) for line in lines if line]


def sample_files(stage: Path) -> list[tuple[int, Path]]:
  """(step, file) of the answers that a stage sampled, in order."""
  paths = (stage / "samples").glob("step_*.jsonl")
  return sorted((int(path.stem.removeprefix("step_")), path) for path in paths)


def mean(rows: Sequence[Row], key: str) -> float | None:
  """Over the rows that have a number there, True being 1."""
  found = (row.get(key) for row in rows)
  values = [float(x) for x in found if isinstance(x, bool) or is_number(x)]
  return sum(values) / len(values) if values else None


def clip(text: object, length: int = 800) -> str:
  """The text, cut where it is longer than a page can bear."""
  text = str(text)
  return text if len(text) <= length else text[:length].rstrip() + " …"
