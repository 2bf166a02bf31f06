"""Records of data files: reading and checks.

Files are JSON lists or JSON Lines in LLaVA's format: an id, a video (a file or its
frames) and a conversation. `read_records` returns the valid examples and, by id, the
problems of the others.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar, cast

from vlmrlaif_jax.core.jsonl import read_numbered_rows
from vlmrlaif_jax.data import templates

PLACEHOLDER = re.compile(r"<(?:image|video)>\n?")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
MAX_REPORTED_PROBLEMS = 20  # Largest number of reasons, and of ids of a reason.
LAYOUT = """expected layout:
  videos/                 the folder to name
    clip.mp4              "video": "clip.mp4"
    clip_50frames/        "video": "clip_50frames", or
      01.jpg 02.jpg ...   "images": ["clip_50frames/01.jpg", ...]"""


class Example(TypedDict):
  """A question about a video, with its answer if there is one."""

  id: str
  video: str | list[str]  # A file, a folder of frames, or frames in order.
  question: str
  answer: str  # "" for a record without an answer.
  source: str  # Name of the data set.
  turns: list[tuple[str, str]]  # All questions and answers, from the first.
  truth: NotRequired[dict[str, Any]]  # Ground truth of the video, for measurements.


class PreferenceExample(TypedDict):
  """A question about a video with two answers, one of them preferred."""

  id: str
  video: str | list[str]  # A file, a folder of frames, or frames in order.
  question: str
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


def read_records(
  path: str | os.PathLike,
  *,
  videos: str | os.PathLike | None = None,
  need_answer: bool = True,
) -> tuple[list[Example], list[SkippedRecord]]:
  """Returns the examples of a file, and the skipped records.

  A record has "conversations", or "question" and "answer".

  Args:
    path: A .json file with a list, or a .jsonl file.
    videos: Folder of the videos that the records name; None for the file's folder.
    need_answer: True to skip records without an answer.

  Raises:
    FileNotFoundError: The file or the folder of videos is missing.
    ValueError: The file is not JSON.
  """
  return _read(path, videos, functools.partial(_make_example, need_answer=need_answer))


def read_preferences(
  path: str | os.PathLike, *, videos: str | os.PathLike | None = None
) -> tuple[list[PreferenceExample], list[SkippedRecord]]:
  """Returns the preferences of a file, and the skipped records.

  A record has a question, "output_1", "output_2" and "preference".

  Args:
    path: A .json file with a list, or a .jsonl file.
    videos: Folder of the videos that the records name; None for the file's folder.

  Raises:
    FileNotFoundError: The file or the folder of videos is missing.
    ValueError: The file is not JSON.
  """
  return _read(path, videos, _make_preference)


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
  ids_by_reason: dict[str, list[str]] = {}
  for problem in problems:
    ids_by_reason.setdefault(problem.reason, []).append(str(problem.id))
  lines, rest = [], len(problems)
  for reason, ids in itertools.islice(ids_by_reason.items(), MAX_REPORTED_PROBLEMS):
    names = ", ".join(ids[:MAX_REPORTED_PROBLEMS])
    more = len(ids) - MAX_REPORTED_PROBLEMS
    lines.append(f"  {names}{f' and {more} more' if more > 0 else ''}: {reason}")
    rest -= len(ids)
  if rest:
    lines.append(f"  and {rest} more.")
  return "\n".join([f"{head}:", *lines])


def _read(
  path: str | os.PathLike,
  videos: str | os.PathLike | None,
  make: Callable[[Mapping[str, Any], dict[str, Any]], Record],
) -> tuple[list[Record], list[SkippedRecord]]:
  """Returns the results of `make` by row, and the rows that raise a ValueError."""
  path = Path(path)
  folder = path.parent if videos is None else Path(videos)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: there is no such folder of videos; {LAYOUT}")
  exists = functools.cache(os.path.exists)  # Many records share a video.
  valid: dict[str, Record] = {}
  problems = []
  for name, row in read_numbered_rows(path):
    try:
      if isinstance(row, str):
        raise ValueError(row)
      name = _get_id(row)
      if name in valid:
        raise ValueError("duplicated id; only the first record with this id is used")
      common = {
        "id": name,
        "video": _resolve_video(row, folder, exists),
        "source": str(row.get("src_data") or row.get("source") or path.stem),
      }
      valid[name] = make(row, common)
    except ValueError as error:
      problems.append(SkippedRecord(name, str(error)))
  return list(valid.values()), problems


def _get_id(row: Mapping[str, Any]) -> str:
  for key in ("id", "uid"):
    if isinstance(row.get(key), str | int) and str(row[key]):
      return str(row[key])
  raise ValueError('it has no "id"')


def _resolve_video(
  row: Mapping[str, Any], folder: Path, exists: Callable[[str], bool]
) -> str | list[str]:
  """Returns the absolute path of a video, or those of its frames."""
  named = row.get("video") or row.get("images") or row.get("image")
  if not named:
    raise ValueError('it has no "video", "images" or "image"')
  names = named if isinstance(named, list) else [named]
  if not all(isinstance(name, str) for name in names):
    raise ValueError(f"video must be a path or a list of paths, not {named!r}"[:200])
  paths = [os.path.abspath(folder / name) for name in names]
  for path in paths:
    if not exists(path):
      raise ValueError(f"video not found: {path}")
  return paths if isinstance(named, list) else paths[0]


def _make_example(
  row: Mapping[str, Any], common: dict[str, Any], *, need_answer: bool
) -> Example:
  turns = _read_turns(row, need_answer)
  question, answer = turns[0]
  required = common | {"question": question, "answer": answer, "turns": turns}
  return cast(Example, required | _read_optional(row, truth=dict))


def _make_preference(
  row: Mapping[str, Any], common: dict[str, Any]
) -> PreferenceExample:
  *history, (question, _) = _read_turns(row, need_answer=False)
  preference = row.get("preference")
  if type(preference) is not int or preference not in (1, 2):
    raise ValueError(f"preference must be 1 or 2, not {preference!r}")
  required = common | {
    "question": question,
    "output_1": _read_output(row, "output_1"),
    "output_2": _read_output(row, "output_2"),
    "preference": preference,
    **({"history": history} if history else {}),
  }
  optional = _read_optional(row, judge=str, flags=dict, truth=dict)
  return cast(PreferenceExample, required | optional)


def _read_optional(row: Mapping[str, Any], **kinds: type) -> dict[str, Any]:
  """Returns the optional fields of a record, after a check of their types."""
  fields = {key: row[key] for key in kinds if row.get(key) is not None}
  for key, value in fields.items():
    if not isinstance(value, kinds[key]):
      reason = f'"{key}" must be a {kinds[key].__name__}, not {value!r}'
      raise ValueError(reason[:200])
  return fields


def _read_output(row: Mapping[str, Any], key: str) -> str:
  output = row.get(key)
  text = output.get("value") if isinstance(output, dict) else output
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f'it has no "{key}", or "{key}" is empty')
  return templates.check_plain_text(text).strip()


def _read_turns(row: Mapping[str, Any], need_answer: bool) -> list[tuple[str, str]]:
  """Returns (question, answer) pairs; the last answer may be "" unless required."""
  questions: list[str] = []
  answers: list[str] = []
  for number, message in enumerate(_read_messages(row), 1):
    role, text = _read_message(message, number)
    is_open = len(questions) > len(answers)
    if is_open == (role == "human"):
      raise ValueError(
        f"turn {number} is from {role}: human and gpt take turns, human first"
      )
    if role == "human" and not text:
      raise ValueError(f"turn {number}: empty question")
    (questions if role == "human" else answers).append(text)
  if len(questions) > len(answers):
    if need_answer:
      raise ValueError("it has no answer")
    answers.append("")
  if not all(answers if need_answer else answers[:-1]):
    raise ValueError(f"turn {2 * answers.index('') + 2}: empty answer")
  return list(zip(questions, answers, strict=True))


def _read_messages(row: Mapping[str, Any]) -> list[Any]:
  """Returns the messages of a record's conversation, or of its question and answer."""
  if "conversations" not in row and "question" in row:
    answer = [row["answer"]] if row.get("answer") else []
    turns = row.get("turns") or [*row.get("history", []), [row["question"], *answer]]
    if not all(isinstance(turn, list | tuple) for turn in turns):
      raise ValueError('"turns" and "history" must contain [question, answer] pairs')
    return [
      {"from": role, "value": text}
      for turn in turns
      for role, text in zip(("human", "gpt"), turn, strict=False)
    ]
  messages = row.get("conversations")
  if not isinstance(messages, list) or not messages:
    raise ValueError('it has no "conversations"')
  return messages


def _read_message(message: Any, number: int) -> tuple[str, str]:
  if not isinstance(message, dict):
    raise ValueError(f"turn {number} must be an object, not {message!r}"[:200])
  role, text = message.get("from", message.get("role")), message.get("value")
  if not isinstance(role, str) or role not in ROLES:
    raise ValueError(f"turn {number}: role must be one of {list(ROLES)}, not {role!r}")
  text = message.get("content") if text is None else text
  if not isinstance(text, str):
    raise ValueError(f"turn {number} has no text")
  text = PLACEHOLDER.sub("", text) if ROLES[role] == "human" else text
  return ROLES[role], templates.check_plain_text(text).strip()
