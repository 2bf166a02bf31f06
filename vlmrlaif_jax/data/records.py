"""Reads and checks the records of data files.

Files are JSON lists or JSON lines in LLaVA's form: an id, a video (a file or its
frames) and a conversation. What is wrong with a record is reported with its id.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar, cast

from vlmrlaif_jax.core.jsonl import read_numbered_rows
from vlmrlaif_jax.data import templates

PLACEHOLDER = re.compile(r"<(?:image|video)>\n?")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
MAX_REPORTED_PROBLEMS = 20  # Problems that a report lists.
LAYOUT = """expected layout:
  videos/                 the folder to name
    clip.mp4              "video": "clip.mp4"
    clip_50frames/        "video": "clip_50frames", or
      01.jpg 02.jpg ...   "images": ["clip_50frames/01.jpg", ...]"""


class Example(TypedDict):
  """A question about a video and, if known, its answer."""

  id: str
  video: str | list[str]  # A file, a folder of frames, or frames in order.
  question: str
  answer: str  # "" if there is none.
  source: str  # The data set it is from.
  turns: list[tuple[str, str]]  # All questions and answers; the above come first.
  truth: NotRequired[dict[str, Any]]  # What is known of the video, for checks.


class PreferenceExample(TypedDict):
  """Two answers to a question about a video, and which one is better."""

  id: str
  video: str | list[str]
  question: str
  output_1: str
  output_2: str
  preference: Literal[1, 2]
  source: str
  history: NotRequired[list[tuple[str, str]]]  # The turns before the question.
  judge: NotRequired[str]  # What the judge said.
  flags: NotRequired[dict[str, Any]]  # What a reader may filter by.
  truth: NotRequired[dict[str, Any]]


Record = TypeVar("Record", Example, PreferenceExample)


class SkippedRecord(NamedTuple):
  """Why a record was left out."""

  id: str  # Or its line or place, if it has none.
  reason: str


def read_records(
  path: str | os.PathLike,
  *,
  videos: str | os.PathLike | None = None,
  need_answer: bool = True,
) -> tuple[list[Example], list[SkippedRecord]]:
  """The examples of a file, and the records left out.

  Beside conversations, a record may hold "question" and "answer" themselves.

  Args:
    path: .json (a list) or .jsonl.
    videos: the folder that the records' videos are named from; the file's own if None.
    need_answer: whether a record without an answer is a problem.

  Raises:
    FileNotFoundError: the file or the folder of videos is missing.
    ValueError: the file is no JSON.
  """
  return _read(path, videos, functools.partial(_example, need_answer=need_answer))


def read_preferences(
  path: str | os.PathLike, *, videos: str | os.PathLike | None = None
) -> tuple[list[PreferenceExample], list[SkippedRecord]]:
  """`read_records` for preferences: with output_1, output_2 and preference."""
  return _read(path, videos, _preference_example)


def order_by_preference(example: PreferenceExample) -> tuple[str, str]:
  """The better answer and the other one."""
  outputs = example["output_1"], example["output_2"]
  return outputs if example["preference"] == 1 else outputs[::-1]


def format_skipped_records(problems: Sequence[SkippedRecord], *, total: int) -> str:
  """One readable block: how many of `total` records were left out, which and why."""
  head = f"{len(problems)} of {total} records left out"
  if not problems:
    return f"{head}."
  lines = [
    f"  {problem.id}: {problem.reason}" for problem in problems[:MAX_REPORTED_PROBLEMS]
  ]
  if len(problems) > MAX_REPORTED_PROBLEMS:
    lines.append(f"  and {len(problems) - MAX_REPORTED_PROBLEMS} more.")
  return "\n".join([f"{head}:", *lines])


def _read(
  path: str | os.PathLike,
  videos: str | os.PathLike | None,
  make: Callable[[Mapping[str, Any], dict[str, Any]], Record],
) -> tuple[list[Record], list[SkippedRecord]]:
  """Returns what `make` returns of each row, and the problems of those for which it, or
  another check of the row, raises a ValueError.
  """
  path = Path(path)
  folder = path.parent if videos is None else Path(videos)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: there is no such folder of videos; {LAYOUT}")
  exists = functools.cache(os.path.exists)  # Many records share a video.
  kept: dict[str, Record] = {}
  problems = []
  for name, row in read_numbered_rows(path):
    try:
      if isinstance(row, str):
        raise ValueError(row)
      name = _id(row)
      if name in kept:
        raise ValueError("duplicated id; the first record that has it is kept")
      common = {
        "id": name,
        "video": _video(row, folder, exists),
        "source": str(row.get("src_data") or row.get("source") or path.stem),
      }
      kept[name] = make(row, common)
    except ValueError as error:
      problems.append(SkippedRecord(name, str(error)))
  return list(kept.values()), problems


def _id(row: Mapping[str, Any]) -> str:
  for key in ("id", "uid"):
    if isinstance(row.get(key), str | int) and str(row[key]):
      return str(row[key])
  raise ValueError('it has no "id"')


def _video(
  row: Mapping[str, Any], folder: Path, exists: Callable[[str], bool]
) -> str | list[str]:
  """Where the video is, in full; a file or a folder, or a list of frames."""
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


def _example(
  row: Mapping[str, Any], common: dict[str, Any], *, need_answer: bool
) -> Example:
  turns = _turns(row, need_answer)
  question, answer = turns[0]
  made = common | {"question": question, "answer": answer, "turns": turns}
  return cast(Example, made | _optional(row, truth=dict))


def _preference_example(
  row: Mapping[str, Any], common: dict[str, Any]
) -> PreferenceExample:
  *history, (question, _) = _turns(row, need_answer=False)
  preference = row.get("preference")
  if type(preference) is not int or preference not in (1, 2):
    raise ValueError(f"preference must be 1 or 2, not {preference!r}")
  made = common | {
    "question": question,
    "output_1": _output(row, "output_1"),
    "output_2": _output(row, "output_2"),
    "preference": preference,
    **({"history": history} if history else {}),
  }
  optional = _optional(row, judge=str, flags=dict, truth=dict)
  return cast(PreferenceExample, made | optional)


def _optional(row: Mapping[str, Any], **kinds: type) -> dict[str, Any]:
  """The fields of these kinds that a record has."""
  found = {key: row[key] for key in kinds if row.get(key) is not None}
  for key, value in found.items():
    if not isinstance(value, kinds[key]):
      reason = f'"{key}" must be a {kinds[key].__name__}, not {value!r}'
      raise ValueError(reason[:200])
  return found


def _output(row: Mapping[str, Any], key: str) -> str:
  output = row.get(key)
  text = output.get("value") if isinstance(output, dict) else output
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f'it has no "{key}", or an empty one')
  return templates.check_plain_text(text).strip()


def _turns(row: Mapping[str, Any], need_answer: bool) -> list[tuple[str, str]]:
  """Questions and answers in turn; the last answer may be "" unless needed."""
  questions: list[str] = []
  answers: list[str] = []
  for number, message in enumerate(_messages(row), 1):
    role, text = _role_and_text(message, number)
    waiting = len(questions) > len(answers)
    if waiting == (role == "human"):
      raise ValueError(
        f"turn {number} is of {role}: human and gpt take turns, human first"
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


def _messages(row: Mapping[str, Any]) -> list[Any]:
  """The conversation, also of a record that has a question in its place."""
  if "conversations" not in row and "question" in row:
    answer = [row["answer"]] if row.get("answer") else []
    turns = row.get("turns") or [*row.get("history", []), [row["question"], *answer]]
    if not all(isinstance(turn, list | tuple) for turn in turns):
      raise ValueError('"turns" and "history" must hold [question, answer] pairs')
    return [
      {"from": role, "value": text}
      for turn in turns
      for role, text in zip(("human", "gpt"), turn, strict=False)
    ]
  messages = row.get("conversations")
  if not isinstance(messages, list) or not messages:
    raise ValueError('it has no "conversations"')
  return messages


def _role_and_text(message: Any, number: int) -> tuple[str, str]:
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
