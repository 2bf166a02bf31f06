"""Reads JSON files and replaces files atomically."""

import json
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
  """Writes a file whole or not at all."""
  part = path.with_name(path.name + ".part")
  part.write_text(text, encoding="utf-8")
  part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
  """A JSON file's object.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is not JSON.
  """
  if not path.exists():
    raise FileNotFoundError(f"{path.parent} has no {path.name}")
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is no JSON: {error}") from error
