"""Reads JSON files and replaces files atomically."""

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def open_replacing(path: Path) -> Iterator[BinaryIO]:
  """Opens a new file that replaces `path` when the block ends without an error.

  A reader gets the old content or all of the new one. Several processes and hosts may
  write one path at the same time. A killed process leaves a file that ends in .tmp.

  Args:
    path: file to replace; it need not exist.
  """
  unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    with unfinished.open("wb") as file:
      yield file
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
  """Replaces a file by a text in UTF-8; see open_replacing."""
  with open_replacing(path) as file:
    file.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
  """Reads the object in a JSON file.

  Raises:
    FileNotFoundError: The file does not exist.
    ValueError: The file is not JSON.
  """
  if not path.exists():
    raise FileNotFoundError(f"{path.parent} has no {path.name}")
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is no JSON: {error}") from error
