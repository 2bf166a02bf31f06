"""Records of data files: reading and checks.

A record has videos or images and a conversation; `formats` reads those of public data
sets. `read_records` returns the valid examples and, by id, the problems of
the others.
"""

import collections
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar

from vlmrlaif_jax.data.formats import conversations, fields, media, preferences, turns
from vlmrlaif_jax.data.formats.row_files import read_file_rows
from vlmrlaif_jax.data.formats.video_files import is_inside
from vlmrlaif_jax.data.video import MediaList

MAX_REPORTED_PROBLEMS = 20  # Largest number of reasons, and of ids of a reason.
MAX_REASON = 300  # Characters of a reason.
# Keys of a record that an example contains in another form.
READ_KEYS = frozenset(
  (
    *fields.ID_KEYS,
    *media.VIDEO_KEYS,
    *media.IMAGE_KEYS,
    *media.PATH_KEYS,
    *itertools.chain(*media.TIME_KEYS),
    *("conversations", "conversation", "messages", "turns", "history", "system"),
    *("question", "answer", "prompt", "completion", "query", "response", "q", "a"),
    *("instruction", "input", "output", "text", "loss", "truth", "source", "src_data"),
  )
)
LAYOUT = """expected layout:
  videos/                 the folder to name
    clip.mp4              "video": "clip.mp4"
    clip_50frames/        "video": "clip_50frames", or
      01.jpg 02.jpg ...   "images": ["clip_50frames/01.jpg", ...]"""


class Example(TypedDict):
  """A question about a video, with its answer if there is one."""

  id: str
  # A file, a folder of frames, frames in order, or several of these.
  video: str | list[str] | MediaList
  question: str  # Has templates.MEDIA_MARK where a video is not at its start.
  answer: str  # "" for a record without an answer.
  source: str  # Name of the data set.
  turns: list[tuple[str, str]]  # All questions and answers, from the first.
  loss: NotRequired[list[bool]]  # Whether SFT learns each answer; absent: all of them.
  truth: NotRequired[dict[str, Any]]  # Ground truth of the video, for measurements.
  fields: NotRequired[dict[str, Any]]  # Other fields of the record, for rewards.


class PreferenceExample(TypedDict):
  """A question about a video with two answers, one of them preferred."""

  id: str
  # A file, a folder of frames, frames in order, or several of these.
  video: str | list[str] | MediaList
  question: str  # Has templates.MEDIA_MARK where a video is not at its start.
  output_1: str
  output_2: str
  preference: Literal[1, 2]  # Number of the better output.
  source: str  # Name of the data set.
  history: NotRequired[list[tuple[str, str]]]  # Turns before the question.
  judge: NotRequired[str]  # Response of the judge.
  flags: NotRequired[dict[str, Any]]  # Properties to filter by.
  truth: NotRequired[dict[str, Any]]  # Ground truth of the video, for measurements.


Record = TypeVar("Record", Example, PreferenceExample)


class SkippedRecord(NamedTuple):
  """A record that cannot be used, with the reason."""

  id: str  # The id, or the place in the file if the record has no id.
  reason: str
  file: str = ""  # Name of the file; "" if the reason is of no file.


def read_records(
  path: str | os.PathLike,
  *,
  videos: str | os.PathLike | None = None,
  need_answer: bool = True,
  written: str | os.PathLike | None = None,
  allow_outside: bool = False,
) -> tuple[list[Example], list[SkippedRecord]]:
  """Returns the examples of a file, and the skipped records.

  An id that repeats gets a number: `v1`, `v1#2`, `v1#3` in the order of the file. A
  record without an id is named by its place, `mine.jsonl:3`. Only a record that equals
  an earlier one of its id is skipped.

  Args:
    path: A file or folder of `row_files.read_file_rows`, in a format of
      docs/data_formats.md.
    videos: Folder of the videos that the records name; None for the file's folder.
    need_answer: True to skip records without an answer.
    written: Folder to which images in the file are written; None for one next to the
      file.
    allow_outside: Whether records may name files outside of both folders.

  Raises:
    FileNotFoundError: The file or the folder of videos is missing.
    ValueError: The file cannot be read.
  """
  make = functools.partial(_make_example, need_answer=need_answer)
  return _read(path, videos, written, allow_outside, make)


def read_preferences(
  path: str | os.PathLike,
  *,
  videos: str | os.PathLike | None = None,
  written: str | os.PathLike | None = None,
  allow_outside: bool = False,
) -> tuple[list[PreferenceExample], list[SkippedRecord]]:
  """Returns the preferences of a file, and the skipped records.

  Args:
    path: A file or folder; see read_records.
    videos: Folder of the videos that the records name; None for the file's folder.
    written: Folder to which images in the file are written; see read_records.
    allow_outside: Whether records may name files outside of both folders.

  Raises:
    FileNotFoundError: The file or the folder of videos is missing.
    ValueError: The file cannot be read.
  """
  valid: list[PreferenceExample]
  valid, problems = _read(path, videos, written, allow_outside, _make_preference)
  has_zero = any(problem.reason == preferences.ZERO for problem in problems)
  if has_zero and all(each["preference"] == 1 for each in valid):
    reason = (
      "preference 1 is ambiguous, because others in the file are 0: number the outputs "
      "1 and 2"
    )
    file = Path(path).name
    problems += [SkippedRecord(each["id"], reason, file) for each in valid]
    valid = []
  return valid, problems


def order_by_preference(example: PreferenceExample) -> tuple[str, str]:
  """Returns the chosen answer, then the rejected one."""
  outputs = example["output_1"], example["output_2"]
  return outputs if example["preference"] == 1 else outputs[::-1]


def format_skipped_records(problems: Sequence[SkippedRecord], *, total: int) -> str:
  """Formats a report of skipped records: reasons, each with the ids that it is for.

  Args:
    problems: The skipped records.
    total: Number of all records.
  """
  head = f"{len(problems)} of {total} records skipped"
  if not problems:
    return f"{head}."
  ids_by_reason: dict[tuple[str, str], list[str]] = {}
  for problem in problems:
    key = (problem.file, problem.reason)
    ids_by_reason.setdefault(key, []).append(str(problem.id))
  lines, rest = [], len(problems)
  for key, ids in itertools.islice(ids_by_reason.items(), MAX_REPORTED_PROBLEMS):
    file, reason = key
    names = ", ".join(ids[:MAX_REPORTED_PROBLEMS])
    more = len(ids) - MAX_REPORTED_PROBLEMS
    place = f"{file}: " if file else ""
    lines.append(f"  {place}{names}{f' and {more} more' if more > 0 else ''}: {reason}")
    rest -= len(ids)
  if rest:
    lines.append(f"  and {rest} more.")
  return "\n".join([f"{head}:", *lines])


def _read(
  path: str | os.PathLike,
  videos: str | os.PathLike | None,
  written: str | os.PathLike | None,
  allow_outside: bool,
  make: Callable[[dict[str, Any], media.MediaFolders], dict[str, Any]],
) -> tuple[list[Record], list[SkippedRecord]]:
  """Returns the results of `make` by row, and the rows that raise a ValueError."""
  path = Path(path)
  folder = path.parent if videos is None else Path(videos)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: there is no such folder of videos; {LAYOUT}")
  written = path.parent / f"{path.name}_media" if written is None else Path(written)
  is_allowed = lambda name: allow_outside or is_inside(name, (folder, written))
  folders = media.MediaFolders(
    videos=folder,
    written=written,
    exists=functools.cache(os.path.exists),  # Many records share a video.
    is_allowed=functools.cache(is_allowed),
  )
  valid: dict[str, Any] = {}
  counts: collections.Counter[str] = collections.Counter()
  digests: set[bytes] = set()
  problems = []
  for place, row in read_file_rows(path):
    name = place
    try:
      if isinstance(row, str):
        raise ValueError(row)
      row = fields.drop_missing(preferences.expand_json_text(row))
      own = fields.read_id(row, f"{path.name}:{place.split()[-1]}")
      name = _number_id(own, counts, valid)
      fields.check_fields(row)
      source = str(row.get("src_data") or row.get("source") or path.stem)
      record = make(row, folders) | {"source": source}
      compared = {key: value for key, value in record.items() if key != "fields"}
      content = repr((own, compared)).encode(errors="backslashreplace")
      digest = hashlib.sha256(content).digest()
      if digest in digests:
        raise ValueError(f"it equals an earlier record with the id {own}")
      digests.add(digest)
      valid[name] = {"id": name, **record}
    except (ValueError, OverflowError, RecursionError) as error:
      problems.append(SkippedRecord(name, _shorten(error), path.name))
  return list(valid.values()), problems


def _number_id(
  own: str, counts: collections.Counter[str], valid: Mapping[str, Any]
) -> str:
  """Returns an id with its number in the file, if it repeats, and counts it."""
  counts[own] += 1
  name = own if counts[own] == 1 else f"{own}#{counts[own]}"
  while name in valid:  # Another record may have a numbered id as its own.
    counts[own] += 1
    name = f"{own}#{counts[own]}"
  return name


def _shorten(error: Exception) -> str:
  """Returns a reason in one line that any terminal can print."""
  reason = (
    "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
  )
  line = " ".join(reason.split())
  return line[:MAX_REASON].encode(errors="backslashreplace").decode()


def _make_example(
  row: dict[str, Any], folders: media.MediaFolders, *, need_answer: bool
) -> dict[str, Any]:
  messages = conversations.read_messages(row)
  visuals = media.find_media(row, messages, folders)
  if need_answer and messages[-1].role != "gpt" and preferences.has_pair(row):
    raise ValueError("it is a preference: give its file as that of preferences")
  has_tags = "question" not in row or conversations.has_list(row)
  talk = turns.join_turns(messages, visuals, need_answer=need_answer, has_tags=has_tags)
  question, answer = talk.turns[0]
  example = {
    "video": talk.video,
    "question": question,
    "answer": answer,
    "turns": talk.turns,
    **({} if all(talk.loss) else {"loss": talk.loss}),
  }
  others = {key: x for key, x in row.items() if key not in READ_KEYS and _is_json(x)}
  optional = _read_optional(row, truth=dict)
  return example | optional | ({"fields": others} if others else {})


def _is_json(value: Any) -> bool:
  try:
    json.dumps(value)
  except (TypeError, ValueError):  # For example, the bytes of a picture.
    return False
  return True


def _make_preference(
  row: dict[str, Any], folders: media.MediaFolders
) -> dict[str, Any]:
  pair = preferences.read_pair(row)
  visuals = media.find_media(row, pair.messages, folders)
  has_tags = "question" not in row or conversations.has_list(row)
  talk = turns.join_turns(pair.messages, visuals, need_answer=False, has_tags=has_tags)
  if pair.output_1.split() == pair.output_2.split():
    raise ValueError("its two answers are identical")
  *history, (question, _) = talk.turns
  example = {
    "video": talk.video,
    "question": question,
    "output_1": pair.output_1,
    "output_2": pair.output_2,
    "preference": pair.preference,
    **({"history": history} if history else {}),
  }
  return example | _read_optional(row, judge=str, flags=dict, truth=dict)


def _read_optional(row: Mapping[str, Any], **kinds: type) -> dict[str, Any]:
  """Returns the optional fields of a record, after a check of their types."""
  optional = {key: row[key] for key in kinds if row.get(key) is not None}
  for key, value in optional.items():
    if not isinstance(value, kinds[key]):
      raise ValueError(f'"{key}" must be a {kinds[key].__name__}, not {value!r}')
  return optional
