"""Reads the files that stages write, for the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vlmrlaif_jax.core import files, jsonl
from vlmrlaif_jax.evals.summary import is_number

Row: TypeAlias = dict[str, Any]


def read_json(path: Path) -> Row:
  """Returns the object in a JSON file, empty if there is no such file."""
  return files.read_json(path, default={})


def read_lines(path: Path) -> list[Row]:
  """Returns the rows of a JSONL file, none if there is no such file."""
  return jsonl.read_jsonl(path) if path.exists() else []


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
