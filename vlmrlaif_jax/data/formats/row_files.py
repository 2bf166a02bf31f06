"""Rows of data files: JSON, JSON Lines, Parquet and saved Hugging Face datasets.

A row that cannot be read is yielded as a reason, so that the other rows are still read.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.jsonl import JsonRow

# Keys of a JSON object that contain the list of records.
LIST_KEYS = ("data", "records", "rows", "samples", "examples", "instances")
KINDS = "a .json, .jsonl or .parquet file, or a folder of Parquet files or of a dataset"
BATCH = 64  # Rows of a columnar file in memory, which may contain images.
_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")  # Of UTF-16 and UTF-32.
_VALUE_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SHARD = re.compile(r"(.*?)(?:-\d+-of-\d+)?\.parquet")


def read_file_rows(path: Path) -> Iterator[tuple[str, JsonRow | str]]:
  """Yields the place of each row, and the row or the reason why it is invalid.

  Args:
    path: A .json file with a list, a .jsonl file, a .parquet file, a folder of the
      Parquet files of one split, or a folder by `datasets.save_to_disk`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: The file has another format, or is damaged.
  """
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}: give {KINDS}")
  suffix = path.suffix.lower()
  if path.is_dir():
    yield from _read_columns(path, _iterate_folder(path))
  elif suffix == ".parquet":
    yield from _read_columns(path, _iterate_parquet(path))
  elif suffix == ".jsonl":
    yield from _read_lines(path)
  elif suffix == ".json":
    yield from _read_json(path)
  else:
    raise ValueError(f"{path}: the name must be that of {KINDS}")


# JSON.


def _read_lines(path: Path) -> Iterator[tuple[str, JsonRow | str]]:
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if number == 1:
        if line.startswith(_WIDE_BOMS):
          raise ValueError(f"{path} is in UTF-16: convert it to UTF-8")
        line = line.removeprefix(_BOM)
      if line.strip():
        yield f"line {number}", _parse_line(line.rstrip())


def _parse_line(line: bytes) -> JsonRow | str:
  try:
    row = _load_json(line.decode("utf-8", "surrogatepass"))
  except UnicodeDecodeError as error:
    return f"invalid UTF-8 at byte {error.start + 1}: convert the file to UTF-8"
  except json.JSONDecodeError as error:
    return f"invalid JSON at column {error.colno}: {error.msg}"
  except RecursionError:
    return _TOO_DEEP
  return row if isinstance(row, dict) else _describe_value(row)


def _read_json(path: Path) -> Iterator[tuple[str, JsonRow | str]]:
  text = _decode(path)
  try:
    rows = _load_json(text)
  except RecursionError:
    rows = _load_items(path, text)
  except json.JSONDecodeError as error:
    if error.msg == "Extra data" and isinstance(_parse_line(_first_line(text)), dict):
      yield from _read_lines(path)  # Hugging Face names JSON Lines .json as well.
      return
    where = f"line {error.lineno}, column {error.colno}"
    raise ValueError(f"{path}, {where}: invalid JSON: {error.msg}") from None
  for number, row in enumerate(_find_list(path, rows), 1):
    yield f"record {number}", row if isinstance(row, dict) else _describe_value(row)


def _first_line(text: str) -> bytes:
  return text.partition("\n")[0].encode(errors="surrogatepass")


def _decode(path: Path) -> str:
  data = path.read_bytes()
  # Lone surrogates survive, so that the reason names the record with them.
  data = data.removeprefix(_BOM)
  encoding = "utf-16" if data.startswith(_WIDE_BOMS) else "utf-8"
  try:
    return data.decode(encoding, "surrogatepass")
  except UnicodeDecodeError as error:
    remedy = "convert it, for example by iconv -f GB18030 -t UTF-8 if it is Chinese"
    raise ValueError(
      f"{path} is not in UTF-8 (byte 0x{data[error.start]:02x} at index "
      f"{error.start}): {remedy}"
    ) from None


def _load_json(text: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    raise
  except ValueError:  # Python converts no integers of more than 4,300 digits.
    return json.loads(text, parse_int=lambda digits: digits)


def _find_list(path: Path, rows: Any) -> list[Any]:
  """Returns the list of a JSON file, which may be in an object."""
  if isinstance(rows, list):
    return rows
  if not isinstance(rows, dict):
    raise ValueError(
      f"{path} must contain a list of records, not {_shorten_json(rows)}"
    )
  keys = [key for key in LIST_KEYS if isinstance(rows.get(key), list)]
  if len(keys) != 1:
    raise ValueError(
      f"{path} must contain a list of records, not an object with "
      f"{_shorten_json(list(rows))}: put the records in a list"
    )
  return rows[keys[0]]


_TOO_DEEP = "its JSON is nested too deeply"


def _load_items(path: Path, text: str) -> list[Any]:
  """Returns the items of a JSON list, with a reason for each that is too deep."""
  decoder = json.JSONDecoder(parse_int=lambda digits: int(digits[:4000]))
  items: list[Any] = []
  at = re.compile(r"\s*").match(text, 0).end()  # type: ignore[union-attr]
  if text[at] != "[":
    raise ValueError(f"{path} must contain a list of records: {_TOO_DEEP}")
  while text[at] != "]":
    at = _skip_space(text, at + 1)
    try:
      item, at = decoder.raw_decode(text, at)
    except RecursionError:
      item, at = _TOO_DEEP, _find_end(text, at)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}: invalid JSON: {error}") from None
    items.append(item)
    at = _skip_space(text, at)
    if text[at : at + 1] not in (",", "]"):
      raise ValueError(f"{path}: invalid JSON at index {at}")
  return items


def _skip_space(text: str, at: int) -> int:
  match = re.compile(r"\s*").match(text, at)
  return match.end() if match else at


def _find_end(text: str, at: int) -> int:
  """Returns the index after the brackets that open at an index."""
  depth = 0
  for match in _VALUE_TOKEN.finditer(text, at):
    depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
    if depth == 0:
      return match.end()
  return len(text)


def _describe_value(value: Any) -> str:
  if value == _TOO_DEEP:
    return _TOO_DEEP
  return f"a record must be a JSON object, not {_shorten_json(value)}"


def _shorten_json(value: Any) -> str:
  try:
    return json.dumps(value)[:40]
  except RecursionError:
    return "nested lists"


# Parquet and Arrow.


def _read_columns(
  path: Path, batches: Iterator[pa.RecordBatch]
) -> Iterator[tuple[str, JsonRow | str]]:
  number = 0
  try:
    for batch in batches:
      batch.validate(full=True)  # Reading a damaged batch may crash the process.
      for row in batch.to_pylist():
        number += 1
        yield f"row {number}", row
  except (pa.ArrowException, OSError) as error:
    raise ValueError(f"{path}, after row {number}: {_first(error)}") from None


def _first(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


def _iterate_parquet(*paths: Path) -> Iterator[pa.RecordBatch]:
  for path in paths:
    with pq.ParquetFile(path) as file:
      yield from file.iter_batches(batch_size=BATCH)


def _iterate_folder(folder: Path) -> Iterator[pa.RecordBatch]:
  if (folder / "dataset_dict.json").exists():
    splits = _read_list(folder / "dataset_dict.json", "splits", str)
    if len(splits) != 1:
      raise ValueError(f"{folder} has the splits {splits}: give the folder of one")
    folder = folder / splits[0]
  if (folder / "state.json").exists():
    yield from _iterate_dataset(folder)
    return
  shards = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
  splits = sorted({_SHARD.sub(r"\1", shard.name) for shard in shards})
  if not shards:
    raise ValueError(f"{folder} is a folder without records: give {KINDS}")
  if len(splits) > 1:
    raise ValueError(f"{folder} has Parquet files of {splits}: give one of the files")
  yield from _iterate_parquet(*shards)


def _iterate_dataset(folder: Path) -> Iterator[pa.RecordBatch]:
  """Yields the batches of a folder by `datasets.Dataset.save_to_disk`."""
  state = folder / "state.json"
  if _read_list(state, "_indices_data_files", dict):
    raise ValueError(
      f"{folder} selects rows by indices: save it again after flatten_indices()"
    )
  for each in _read_list(state, "_data_files", dict):
    with pa.memory_map(str(folder / str(each.get("filename")))) as source:
      for batch in pa.ipc.open_stream(source):
        for start in range(0, batch.num_rows, BATCH):
          yield batch.slice(start, BATCH)


def _read_list(path: Path, key: str, kind: type) -> list[Any]:
  """Returns a list in a JSON object that Hugging Face's `datasets` has written."""
  try:
    value = read_json(path)
  except RecursionError:
    value = None
  items = (value.get(key) or []) if isinstance(value, dict) else None
  if not isinstance(items, list) or not all(isinstance(each, kind) for each in items):
    raise ValueError(f"{path} is not by save_to_disk: it has no list {key!r}")
  return items
