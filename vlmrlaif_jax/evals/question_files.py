"""Reads the files of benchmarks as their sources publish them: JSON, CSV and Parquet.

A row that cannot be used is skipped and reported with its file and place. A file
without a usable row is an error.
"""

import csv
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.data.formats import row_files
from vlmrlaif_jax.data.records import SkippedRecord, format_skipped_records
from vlmrlaif_jax.evals.benchmarks.protocol import Source, find_answers_file

Item = TypeVar("Item")
FileRow: TypeAlias = dict[str, Any]
TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# Names of the fields in the published files, in the order of precedence.
VIDEO_KEYS = (
  *("videoID", "video_path", "video_name", "gif_name", "video", "video_id"),
  *("video_idx", "q_uid", "vid"),
)
QUESTION_ID_KEYS = ("question_id", "q_uid", "qid", "question_idx", "id", "key")
QUESTION_KEYS = ("question", "Q")
ANSWER_KEYS = ("answer", "A")


def load_items(
  path: pathlib.Path | str,
  source: Source,
  make: Callable[[int, FileRow], Item],
  problems: list[SkippedRecord] | None = None,
  *,
  keys: Sequence[str] = (),
  once: Sequence[str] = (),
) -> list[Item]:
  """Returns the items of a file's rows.

  Args:
    path: A file, see `read_question_rows`.
    source: Origin of the file, for error messages.
    make: Returns the item of a row and its number, from 1. It raises ValueError for a
      row that cannot be used. The row has no empty cells.
    problems: Receives the skipped rows.
    keys: Keys that each row must have.
    once: Keys whose combined values must be unique; () checks nothing.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: The file has another layout, or no usable row.
  """
  path = pathlib.Path(path)
  items: list[Item] = []
  skipped: list[SkippedRecord] = []
  seen: set[str] = set()
  for number, (place, row) in enumerate(read_question_rows(path, source), 1):
    try:
      if isinstance(row, str):
        raise ValueError(row)
      missing = [key for key in keys if key not in row]
      if missing:
        raise ValueError(f"it has no {missing}")
      name = ":".join(str(row[key]) for key in once)
      if name and name in seen:
        raise ValueError(f"{':'.join(once)} {name} is there twice")
      items.append(make(number, row))
      seen.add(name)
    except (ValueError, TypeError) as error:
      skipped.append(SkippedRecord(place, str(error), path.name))
  if not items:
    reasons = format_skipped_records(skipped, total=len(skipped))
    rows = f"usable record. {reasons}" if skipped else "record"
    raise ValueError(f"{path} has no {rows}\n{source.describe()}")
  if problems is not None:
    problems += skipped
  return items


def read_question_rows(
  path: pathlib.Path, source: Source
) -> Iterator[tuple[str, FileRow | str]]:
  """Yields the place of each row of a file, and the row or the reason why it is none.

  Empty cells (null, NaN and blank texts) are left out. A list of questions inside a row
  yields a row for each question, with the fields of the row.

  Args:
    path: A file with one of TABLE_SUFFIXES. A JSON object of objects has ids of videos
      as its keys.
    source: Origin of the file, for error messages.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: The file cannot be read in its format.
  """
  if not path.is_file():
    raise FileNotFoundError(f"no file at {path}: {source.describe()}")
  try:
    rows = list(_read_file(path))
  except (ValueError, OSError) as error:  # Also JSON, Unicode and Parquet errors.
    kind = path.suffix.removeprefix(".").upper()
    raise ValueError(f"{path} is not {kind} ({error}): {source.describe()}") from None
  for place, row in rows:
    if not isinstance(row, dict):
      yield place, row if isinstance(row, str) else "it is not an object"
      continue
    questions = list(_split_questions(row))
    for number, question in enumerate(questions, 1):
      part = f", question {number}" if len(questions) > 1 else ""
      yield place + part, {k: x for k, x in question.items() if not is_empty(x)}


def is_empty(value: Any) -> bool:
  """Returns whether a cell is empty: null, NaN or a blank text."""
  if isinstance(value, float):
    return math.isnan(value)
  return value is None or (isinstance(value, str) and not value.strip())


def _read_file(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  suffix = path.suffix.lower()
  if suffix in (".jsonl", ".parquet"):
    yield from row_files.read_file_rows(path)
  elif suffix == ".json":
    content = read_json(path)
    for number, row in enumerate(_list_rows(content), 1):
      # A JSON text in place of a record is no reason.
      yield f"record {number}", [row] if isinstance(row, str) else row
  elif suffix in (".csv", ".tsv"):
    yield from _read_table(path)
  else:
    raise ValueError(f"the name must end in one of {' '.join(TABLE_SUFFIXES)}")


def _list_rows(content: Any) -> list[Any]:
  """Returns the rows of a JSON file: a list, one list of an object, or its objects."""
  if isinstance(content, list):
    return content
  if not isinstance(content, dict):
    raise ValueError("it must contain a list of records")
  lists = [value for value in content.values() if isinstance(value, list)]
  if len(lists) == 1 and not any(isinstance(x, dict) for x in content.values()):
    return lists[0]
  if content and all(isinstance(value, dict) for value in content.values()):
    return [{"video_id": key, **value} for key, value in content.items()]
  raise ValueError("it must contain a list of records")


def _read_table(path: pathlib.Path) -> Iterator[tuple[str, FileRow | str]]:
  with path.open(encoding="utf-8-sig", newline="") as file:
    head = file.readline()
    file.seek(0)
    # TGIF-QA separates the columns of its .csv files by tabs.
    tabs = head.count("\t") > head.count(",")
    reader = csv.DictReader(file, delimiter="\t" if tabs else ",")
    for row in reader:
      has_rest = None in row  # The key of cells without a column.
      reason = "it has more cells than the first line has columns"
      yield f"line {reader.line_num}", reason if has_rest else dict(row)


def _split_questions(row: FileRow) -> Iterator[FileRow]:
  """Yields a row for each question in the lists of a row, or the row itself."""
  lists = {
    key: value
    for key, value in row.items()
    if isinstance(value, list)
    and value
    and all(isinstance(each, dict) and "question" in each for each in value)
  }
  if not lists:
    yield row
  shared = {key: value for key, value in row.items() if key not in lists}
  for key, questions in lists.items():
    for question in questions:
      yield {**shared, "dim": key, **question}  # TempCompass names dimensions by keys.


# Fields.


def get_text(row: Mapping[str, Any], keys: Sequence[str]) -> str:
  """Returns the first of a row's fields that is there, as text.

  Raises:
    ValueError: The row has none of the fields, or the value is no text or number.
  """
  key = next((key for key in keys if key in row), None)
  if key is None:
    names = " or ".join(f'"{name}"' for name in keys[:4])
    raise ValueError(f"it has no {names}")
  value = row[key]
  if isinstance(value, float) and value.is_integer():
    value = int(value)  # As a table with empty cells stores integers.
  if not isinstance(value, str | int | float) or isinstance(value, bool):
    raise ValueError(f"{key} must be a text, got {value!r}"[:200])
  return str(value).strip()


def get_video_names(row: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names that the video of a row may have.

  MSRVTT-QA has the number 7010 for video7010, and MSVD-QA 1301 for vid1301.
  """
  name = get_text(row, VIDEO_KEYS)
  return (name, f"video{name}", f"vid{name}") if name.isdecimal() else (name,)


def read_answers(questions: pathlib.Path) -> dict[str, Any]:
  """Returns the answers that a file next to the questions has, by id; {} for no file.

  Raises:
    ValueError: The file has another layout.
  """
  path = find_answers_file(questions)
  if path is None:
    return {}
  try:
    content = read_json(path)
    if isinstance(content, dict):
      return content
    return {get_text(row, QUESTION_ID_KEYS): row["answer"] for row in content}
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} must contain a list of records with question_id and answer, or an "
      f"object of answers by id ({error!r})"
    ) from None
