"""Preferences of rows, in the formats of public data sets.

Each format has two answers, and names the better one by a number or by its key.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vlmrlaif_jax.data.formats.conversations import (
  has_conversation,
  read_messages,
  read_transcript,
)
from vlmrlaif_jax.data.formats.messages import (
  Message,
  RecordRow,
  check_answer,
  read_content,
  read_message_list,
)

# Keys of two answers and of the number of the better one, counted from 1 or 0.
NUMBERED = (
  ("output_1", "output_2", "preference", 1),
  ("response_1", "response_2", "overall_response", 1),  # align-anything
  ("response_0", "response_1", "better_response_id", 0),  # PKU-SafeRLHF
)
# Keys of the better and of the worse answer.
NAMED = (
  ("chosen", "rejected"),
  ("preferred_output", "non_preferred_output"),  # OpenAI
)
# Keys of a second conversation that ends with the worse answer.
_REJECTED_CONVERSATIONS = ("rejected_messages", "rejected_conversations")
ZERO = "preference must be 1 or 2, not 0"


class Pair(NamedTuple):
  """Two answers to one prompt."""

  messages: list[Message]  # Ends with the question, or with an answer to ignore.
  output_1: str
  output_2: str
  preference: Literal[1, 2]  # Number of the better output.


def expand_json_text(row: RecordRow) -> RecordRow:
  """Returns a row with the fields of RLHF-V's "text", which is a JSON object."""
  text = row.get("text")
  if not isinstance(text, str) or not text.lstrip().startswith("{"):
    return row
  try:
    fields = json.loads(text)
  except ValueError:
    return row
  rest = {key: value for key, value in row.items() if key != "text"}
  return rest | fields if isinstance(fields, dict) else row


def has_pair(row: RecordRow) -> bool:
  """Returns whether a row has the answers of a preference."""
  keys = [key for form in (*NUMBERED, *NAMED) for key in form[:2]]
  return any(
    row.get(key) is not None
    for key in (*keys, "rejected_response", *_REJECTED_CONVERSATIONS)
  )


def read_pair(row: RecordRow) -> Pair:
  """Returns the answers of a preference in any of the formats.

  Raises:
    ValueError: The row has no two answers, two formats, or no preference.
  """
  numbered = [form for form in NUMBERED if row.get(form[0]) is not None]
  named = [form for form in NAMED if any(row.get(key) is not None for key in form)]
  whole = [key for key in _REJECTED_CONVERSATIONS if row.get(key)]
  single = ["rejected_response"] if row.get("rejected_response") else []
  if "response_0" in row:  # "response_1" is the first key of another format.
    numbered = [form for form in numbered if form[0] != "response_1"]
  if len(numbered) + len(named) + len(whole) + len(single) > 1:
    raise ValueError("it has the answers of two formats of preferences: keep one")
  if named:
    return _read_named(row, *named[0])
  if whole or single:
    return _read_beside(row, (whole + single)[0])
  first, second, key, offset = numbered[0] if numbered else NUMBERED[0]
  outputs = [_read_answer(row.get(each), each) for each in (first, second)]
  preference = _read_number(row.get(key), key, offset)
  return Pair(read_messages(row), outputs[0], outputs[1], preference)


def _read_number(value: Any, key: str, offset: int) -> Literal[1, 2]:
  """Returns 1 or 2 for a number, its text, or a letter."""
  text = str(value).strip().upper() if isinstance(value, str | int | float) else ""
  text = text.removesuffix(".0").removeprefix("OUTPUT_").removeprefix("RESPONSE_")
  names = {str(offset): 1, str(offset + 1): 2, **({"A": 1, "B": 2} if offset else {})}
  if isinstance(value, bool) or text not in names:
    if text == "0" and not isinstance(value, bool):
      raise ValueError(ZERO)
    raise ValueError(f"{key} must be {offset} or {offset + 1}, not {value!r}")
  return 1 if names[text] == 1 else 2


def _read_answer(value: Any, key: str) -> str:
  """Returns the text of an answer: a text, a message, or a list of one message."""
  if isinstance(value, list) and len(value) == 1:
    value = value[0]
  if isinstance(value, list) and not all(isinstance(part, Mapping) for part in value):
    raise ValueError(f'"{key}" must be one answer, not {len(value)}')
  role = None
  if isinstance(value, Mapping) and not value.get("type"):
    role = value.get("from", value.get("role"))
    value = value.get("value", value.get("content"))
  if value is None or (isinstance(value, str) and not value.strip()):
    raise ValueError(f'it has no "{key}", or "{key}" is empty')
  if role is not None:
    [message] = read_message_list([{"from": role, "value": value}], key)
    if message.role != "gpt":
      raise ValueError(f'"{key}" is from {role}, but must be an answer')
  else:
    text, media, _ = read_content(value, f'"{key}"')
    message = Message("gpt", text, media)
  text = check_answer(message, f'"{key}"')
  if not text:
    raise ValueError(f'it has no "{key}", or "{key}" is empty')
  return text


def _read_named(row: RecordRow, better: str, worse: str) -> Pair:
  """Reads "chosen" and "rejected": answers, or conversations that end with them."""
  values = row.get(better), row.get(worse)
  source = row["input"] if isinstance(row.get("input"), Mapping) else row
  rest = {k: v for k, v in source.items() if k not in (better, worse)}
  has_prompt = has_conversation(rest)
  if not has_prompt and all(isinstance(each, str) for each in values):
    talks = [read_transcript(str(each)) for each in values]
  elif all(_is_talk(each) for each in values):
    talks = [read_message_list(each, better) for each in values]
  else:
    outputs = [_read_answer(v, k) for v, k in zip(values, (better, worse), strict=True)]
    return Pair(read_messages(rest), outputs[0], outputs[1], 1)
  prompt = talks[0][:-1]
  if has_prompt:
    _check_same_question(read_messages(rest), prompt)
  return _split_talks(prompt, talks)


def _is_talk(value: Any) -> bool:
  """Returns whether a value is a list of messages that starts with the prompt."""
  if not isinstance(value, list) or len(value) < 2:
    return False
  first = value[0]
  return isinstance(first, Mapping) and bool(first.get("role") or first.get("from"))


def _check_same_question(explicit: list[Message], implicit: list[Message]) -> None:
  questions = [
    [message.text.strip() for message in messages if message.role == "human"]
    for messages in (explicit, implicit)
  ]
  if questions[0][-1:] != questions[1][-1:]:
    raise ValueError("its prompt differs from the question of its answers: keep one")


def _read_beside(row: RecordRow, key: str) -> Pair:
  """Reads a conversation that ends with the better answer, and a worse answer."""
  messages = read_messages(row)
  if not messages or messages[-1].role != "gpt":
    raise ValueError(
      f'its conversation must end with an answer, because it has "{key}"'
    )
  if key == "rejected_response":
    worse = _read_answer(row[key], key)
    return Pair(messages[:-1], check_answer(messages[-1], "the answer"), worse, 1)
  return _split_talks(messages[:-1], [messages, read_message_list(row[key], key)])


def _split_talks(prompt: list[Message], talks: Sequence[list[Message]]) -> Pair:
  """Returns the last answers of two conversations that are equal before them."""
  heads = [[(m.role, m.text.strip()) for m in talk[:-1]] for talk in talks]
  without_system = [[each for each in head if each[0] != "system"] for head in heads]
  if without_system[0] != without_system[1]:
    raise ValueError("its two conversations differ before the last answer")
  if any(talk[-1].role != "gpt" for talk in talks):
    raise ValueError("its two conversations must end with an answer")
  better, worse = (check_answer(talk[-1], "the answer") for talk in talks)
  if not (better and worse):
    raise ValueError("one of its answers is empty")
  return Pair(prompt, better, worse, 1)
