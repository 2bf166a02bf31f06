"""JSON Lines files: atomic replacement, and appends that survive a crash."""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from vlmrlaif_jax.core.files import name_file_in_errors, open_replacing

JsonRow: TypeAlias = dict[str, Any]  # A JSON object.
CHECKSUM = "crc32"  # Key of a row's checksum.


def write_records(
  path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], mode: int = 0o666
) -> None:
  """Writes records as JSON lines; an interrupted write leaves the old file.

  Args:
    path: The file, which may be missing.
    rows: All records of the file.
    mode: Permissions of the new file, as `os.open` takes them.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open_replacing(path, mode) as file:
    file.writelines(map(_line, rows))
    file.flush()
    os.fsync(file.fileno())


def append_jsonl(
  path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], mode: int = 0o666
) -> None:
  """Appends JSON lines, after removing an incomplete last line of a killed writer.

  Args:
    path: The file, which may be missing.
    rows: Records to append.
    mode: Permissions of a new file, as `os.open` takes them.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  opener = lambda name, flags: os.open(name, flags, mode)
  with name_file_in_errors(path), open(path, "ab+", opener=opener) as file:
    rest = _read_unended(file)
    if isinstance(_parse(rest), dict):
      file.write(b"\n")  # The record is complete; only its newline is missing.
    else:
      file.truncate(file.seek(0, os.SEEK_END) - len(rest))
    file.write(b"".join(map(_line, rows)))


def _read_unended(file: BinaryIO) -> bytes:
  """Returns the bytes after the last newline of a file."""
  rest, at = b"", file.seek(0, os.SEEK_END)
  while at and b"\n" not in rest:
    length = min(at, max(1, len(rest)))  # One byte suffices for a complete file.
    at = file.seek(at - length)
    rest = file.read(length) + rest
  return rest.rpartition(b"\n")[2]


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the records of a JSON Lines file, without an incomplete last line.

  Raises:
    ValueError: A line is not a JSON object.
  """
  rows = []
  with Path(path).open("rb") as file:
    for number, line in enumerate(file, 1):
      row = _parse(line)
      if isinstance(row, dict):
        rows.append(row)
      elif line.endswith(b"\n") and line.strip():
        raise ValueError(f"{path}, line {number}: {row}")
  return rows


def seal_row(row: Mapping[str, Any]) -> JsonRow:
  """Returns a row with a checksum, which `read_intact_rows` checks and removes."""
  return {**row, CHECKSUM: zlib.crc32(_line(row))}


def read_intact_rows(path: str | os.PathLike) -> tuple[list[JsonRow], dict[int, str]]:
  """Returns the intact rows of a file, and the reason of each damaged line by number.

  A row is damaged if it is no JSON object, or differs from its checksum. A row without
  a checksum passes. An incomplete last line is left out, as in `read_jsonl`.
  """
  rows, damaged = [], {}
  with Path(path).open("rb") as file:
    for number, line in enumerate(file, 1):
      row = _parse(line)
      if isinstance(row, dict):
        checksum = row.pop(CHECKSUM, None)
        if checksum is None or checksum == zlib.crc32(_line(row)):
          rows.append(row)
        else:
          damaged[number] = "the checksum differs"
      elif line.endswith(b"\n") and line.strip():
        damaged[number] = row
  return rows, damaged


def format_damage(path: str | os.PathLike, damaged: Mapping[int, str]) -> str:
  """Formats the damaged lines of a file: its path, their numbers and a reason."""
  number, reason = next(iter(damaged.items()))
  more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
  return f"{path}: line {number}{more} is damaged ({reason})"


def _parse(line: bytes) -> dict[str, Any] | str:
  """Returns the record in a line, or the reason why there is none."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    return f"invalid JSON at column {error.colno}: {error.msg}"
  except UnicodeDecodeError as error:
    return f"invalid UTF-8 at byte {error.start + 1}"
  except (ValueError, RecursionError) as error:  # Long numbers, and deep nesting.
    return f"invalid JSON: {error}"
  if not isinstance(row, dict):
    return f"a record must be a JSON object, not {json.dumps(row)[:40]}"
  return row


def _line(row: Mapping[str, Any]) -> bytes:
  """Formats a line for `_parse`; lone surrogates, which models write, survive."""
  return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
