"""Conversations of rows, in the formats of public data sets, as messages."""

from collections.abc import Callable, Sequence
from typing import Any

from vlmrlaif_jax.data.formats.messages import (
  Message,
  RecordRow,
  quote_keys,
  read_message_list,
  read_text,
)

LISTS = ("conversations", "messages", "conversation")  # Keys of a list of messages.
# Keys of a question, and of its answer.
QUESTIONS = {
  "question": ("answer",),
  "query": ("response",),
  "prompt": ("completion", "response", "answer"),
  "instruction": ("output", "response"),
  "q": ("a",),
  "Q": ("A",),
}
SYSTEMS = ("system", "system_prompt")


def read_messages(row: RecordRow) -> list[Message]:
  """Returns the messages of a row, with the system text first.

  Raises:
    ValueError: The row has no conversation, more than one, or one of another format.
  """
  lists = [key for key in LISTS if row.get(key)]
  if len(lists) > 1:
    raise ValueError(f"it has both {quote_keys(lists)}: remove one of them")
  if lists:
    messages = read_message_list(row[lists[0]], lists[0])
  else:
    messages = _find_reader(row)(row)
  if not messages:
    raise ValueError("it has no question")
  for key in SYSTEMS:
    text = row.get(key)
    first = messages[0]
    if text in (None, "") or (first.role, first.text) == ("system", text):
      continue
    if first.role == "system":
      raise ValueError(f'"{key}" differs from the system turn: remove one of them')
    messages = [Message("system", read_text(text, f'"{key}"')), *messages]
  return messages


def has_list(row: RecordRow) -> bool:
  """Returns whether a row has a list of messages."""
  return any(row.get(key) for key in LISTS)


def has_conversation(row: RecordRow) -> bool:
  """Returns whether a row has a key of a conversation."""
  return any(row.get(key) for key in (*LISTS, *QUESTIONS, "QA", "texts", "turns"))


def _find_reader(row: RecordRow) -> Callable[[RecordRow], list[Message]]:
  """Returns the reader of a row without a list of messages."""
  if isinstance(row.get("QA"), list):
    return _read_videochat
  if isinstance(row.get("texts"), list):
    return _read_cauldron
  if row.get("turns") or any(key in row for key in QUESTIONS):
    return _read_question
  raise ValueError(
    'it has no "conversations", "messages", "question" or "prompt" with a text'
  )


# Formats without a list of messages.


def _read_question(row: RecordRow) -> list[Message]:
  """Reads a question with its answer, and pairs of earlier turns."""
  key = next((key for key in QUESTIONS if row.get(key) is not None), "question")
  question, history = row.get(key), row.get("history") or []
  if isinstance(question, list):  # TRL's conversational format.
    more = row.get("completion") or []
    return read_message_list(question + (more if isinstance(more, list) else []), key)
  answers = [row[name] for name in QUESTIONS[key] if row.get(name) is not None]
  if key == "instruction" and row.get("input"):
    question = f"{read_text(question, key)}\n{read_text(row['input'], 'input')}"
  if isinstance(question, str) and question.lstrip().startswith("Human:"):
    return read_transcript(question)
  earlier = row.get("turns") or history
  last = [] if row.get("turns") else [[question, *answers[:1]]]
  if not isinstance(earlier, list) or not all(map(_is_pair, earlier)):
    raise ValueError('"turns" and "history" must contain [question, answer] pairs')
  pairs = [*earlier, *last]
  loss = row.get("loss") or [True] * len(pairs)
  is_flags = isinstance(loss, list) and all(isinstance(each, bool) for each in loss)
  if not is_flags or len(loss) != len(pairs):
    raise ValueError('"loss" must contain true or false for each turn')
  return _make_messages(pairs, loss)


def _is_pair(value: Any) -> bool:
  return isinstance(value, list) and len(value) in (1, 2)


def _make_messages(
  pairs: Sequence[Sequence[Any]], loss: Sequence[bool] | None = None
) -> list[Message]:
  """Returns the messages of (question, answer) pairs."""
  messages = []
  for number, pair in enumerate(pairs):
    flag = True if loss is None else bool(loss[number])
    for role, value in zip(("human", "gpt"), pair, strict=False):
      text = read_text(value, "the question" if role == "human" else "the answer")
      is_gpt = role == "gpt"
      messages.append(Message("gpt" if is_gpt else "human", text, loss=is_gpt and flag))
  return messages


def _read_videochat(row: RecordRow) -> list[Message]:
  """Reads VideoChat2's "QA": an instruction, a question and an answer per turn."""
  pairs = []
  for each in row["QA"]:
    if not isinstance(each, dict):
      raise ValueError(f'"QA" must contain objects, not {each!r}')
    question = [read_text(each[key], "QA") for key in ("i", "q") if each.get(key)]
    pairs.append(["\n".join(question), each.get("a")])
  return _make_messages(pairs)


def _read_cauldron(row: RecordRow) -> list[Message]:
  """Reads The Cauldron's "texts": objects with "user" and "assistant"."""
  texts = row["texts"]
  if not all(isinstance(each, dict) for each in texts):
    raise ValueError('"texts" must contain objects with "user" and "assistant"')
  return _make_messages([[each.get("user"), each.get("assistant")] for each in texts])


def read_transcript(text: str) -> list[Message]:
  r"""Reads Anthropic's transcripts: "\n\nHuman: ...\n\nAssistant: ...".

  Raises:
    ValueError: The text does not start with "Human:".
  """
  messages: list[Message] = []
  for part in ("\n\n" + text.lstrip()).split("\n\nHuman:")[1:]:
    question, *answers = part.split("\n\nAssistant:")
    messages.append(Message("human", read_text(question.strip(), "the prompt")))
    answer = "\n\nAssistant:".join(answers).strip()
    if answer:
      messages.append(Message("gpt", answer))
  if not messages:
    raise ValueError('a transcript must start with "Human:"')
  return messages
