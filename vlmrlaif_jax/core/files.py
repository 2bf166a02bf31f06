"""JSON files, atomic replacement of files and comparison of nested settings.

Nothing here imports JAX, so that programs can use it before they choose a backend.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_MB = 256  # Size of a JSON file; the largest tokenizers have 35 MB.


def check_readable(path: Path) -> None:
  """Checks that a path is a regular file, which ends, of at most MAX_JSON_MB.

  Raises:
    ValueError: The path is something else, or the file is larger.
  """
  if not path.is_file():
    raise ValueError(f"{path} is not a regular file. Give the folder of a checkpoint.")
  if (size := path.stat().st_size / 1e6) > MAX_JSON_MB:
    raise ValueError(f"{path} has {size:.0f} MB; at most {MAX_JSON_MB} MB are read.")


def hash_file(path: Path) -> str:
  """Returns the hexadecimal SHA-256 of a file's content, "" without a file."""
  if not path.is_file():
    return ""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
  """Adds the path to an OSError of the block that has none, as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = str(path)
    raise


@contextlib.contextmanager
def open_replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
  """Opens a new file that replaces `path` when the block ends without an error.

  A reader sees either the old content or all of the new content. Several processes and
  hosts may write one path concurrently. A killed process leaves a file that ends in
  .tmp.

  Args:
    path: The file to replace, which may be missing.
    mode: Permissions of the new file, as `os.open` takes them.
  """
  opener = lambda name, flags: os.open(name, flags, mode)
  # No file or link has this name, or the open fails.
  unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    with name_file_in_errors(path), open(unfinished, "xb", opener=opener) as file:
      yield file
    unfinished.replace(path)
  finally:
    with contextlib.suppress(OSError):  # The error of the write counts.
      unfinished.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
  """Replaces a file atomically with a text in UTF-8."""
  with open_replacing(path) as file:
    file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
  """Replaces a file atomically with a value as indented JSON."""
  replace_text(path, json.dumps(value, indent=2))


def read_json(path: Path, default: Any = None) -> Any:
  """Returns the value in a JSON file.

  Args:
    path: The file.
    default: Returned if the file does not exist. None raises instead.

  Raises:
    FileNotFoundError: The file does not exist, and `default` is None.
    ValueError: The file is not JSON, not a regular file, or larger than MAX_JSON_MB.
  """
  if not path.exists():
    if default is None:
      raise FileNotFoundError(f"{path.parent} has no {path.name}")
    return default
  check_readable(path)
  try:
    return json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:  # Python limits the nesting.
    raise ValueError(f"{path} is not JSON ({error})") from error


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the leaves of nested settings by dotted name.

  >>> flatten_settings({"a": {"b": 1, "c": 2}, "d": 3})
  {'a.b': 1, 'a.c': 2, 'd': 3}
  """
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      leaves |= flatten_settings(value, f"{prefix}{name}.")
    else:
      leaves[f"{prefix}{name}"] = value
  return leaves


def align_leaves(*trees: Mapping[str, Any]) -> dict[str, list[Any]]:
  """Collects the values that several nested settings have for each leaf.

  Returns:
    Dotted name -> one value per tree. None marks a tree without that leaf.
  """
  flat = [flatten_settings(tree) for tree in trees]
  names = dict.fromkeys(name for leaves in flat for name in leaves)
  return {name: [leaves.get(name) for leaves in flat] for name in names}


def find_differences(*trees: Mapping[str, Any]) -> dict[str, list[Any]]:
  """Returns the leaves whose values differ, in the form of `align_leaves`."""
  rows = align_leaves(*trees).items()
  return {name: each for name, each in rows if each.count(each[0]) < len(each)}
