"""Conversations of rows, in the formats of public data sets.

`read_messages` converts each format to messages. `join_turns` converts messages to
(question, answer) pairs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.formats import placeholders

RecordRow: TypeAlias = Mapping[str, Any]

ROLES: dict[str, Literal["system", "human", "gpt"]] = {
  **dict.fromkeys(("human", "user"), "human"),
  **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "gpt"),
  **dict.fromkeys(("system", "developer"), "system"),
}
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
LOSS_FLAGS = ("loss", "train", "weight", "loss_weight")  # Keys of a message.
# Keys of a message that change its meaning and are not supported, and the remedy.
_REJECTED = {
  **dict.fromkeys(
    ("tool_calls", "function_call", "tool_call_id"), "the models call no tools"
  ),
  **dict.fromkeys(
    ("reasoning_content", "reasoning", "thinking"), "write it into the text"
  ),
  **dict.fromkeys(("mask", "loss_scale"), 'give "loss" as true or false'),
  **dict.fromkeys(("prefix", "partial"), "the models continue no answers"),
  **dict.fromkeys(("audio", "audios"), "the models read no audio"),
}
_MEDIA = ("video", "videos", "image", "images")


class Message(NamedTuple):
  """A message of a conversation."""

  role: Literal["system", "human", "gpt"]
  text: str  # Contains placeholders of media.
  media: tuple[tuple[str, Any], ...] = ()  # ("video" or "image", name) of its parts.
  loss: bool = True  # False to exclude an answer from the loss.
  options: tuple[tuple[str, Any], ...] = ()  # Options of a video: its part in time.


class Conversation(NamedTuple):
  """A conversation as turns."""

  turns: list[tuple[str, str]]  # (question, answer); the last answer may be "".
  loss: list[bool]  # Whether the loss includes the answer of each turn.
  placeholders: int  # Number of placeholders that were removed.


# Messages.


def read_messages(row: RecordRow) -> list[Message]:
  """Returns the messages of a row, with the system text first.

  Raises:
    ValueError: The row has no conversation, more than one, or one of another format.
  """
  lists = [key for key in LISTS if row.get(key)]
  if len(lists) > 1:
    raise ValueError(f"it has both {_quote(lists)}: remove one of them")
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


def read_message_list(value: Any, key: str) -> list[Message]:
  """Returns the messages of a list of objects with a role and a text.

  Raises:
    ValueError: The list is empty, or a message is not valid.
  """
  if isinstance(value, str) and value.lstrip().startswith("["):
    value = json.loads(value)  # Tables may contain lists as JSON.
  if isinstance(value, dict) and all(isinstance(v, list) for v in value.values()):
    columns = value.values()  # Hugging Face datasets may store a list as columns.
    value = [dict(zip(value, each, strict=True)) for each in zip(*columns, strict=True)]
  if not isinstance(value, list) or not value:
    raise ValueError(f'it has no "{key}"')
  return [_read_message(each, number) for number, each in enumerate(value, 1)]


def _read_message(message: Any, number: int) -> Message:
  if not isinstance(message, dict):
    raise ValueError(f"turn {number} must be an object, not {message!r}")
  message = {key: value for key, value in message.items() if value is not None}
  role = message.get("from", message.get("role"))
  kind = ROLES.get(role.lower()) if isinstance(role, str) else None
  if kind is None:
    known = ["system", "human", "user", "gpt", "assistant"]
    raise ValueError(f"turn {number}: role must be one of {known}, not {role!r}")
  for key, remedy in _REJECTED.items():
    if message.get(key):
      raise ValueError(f'turn {number} has "{key}": {remedy}')
  text, media, options = read_content(
    message.get("value", message.get("content")), f"turn {number}"
  )
  for key in _MEDIA:
    named = message.get(key) or []
    names = named if isinstance(named, list) else [named]
    media += tuple((key.removesuffix("s"), name) for name in names)
  loss = _read_loss(message, kind, number)
  return Message(kind, text, media, loss, options)


def _read_loss(message: RecordRow, kind: str, number: int) -> bool:
  flags = {key: message[key] for key in LOSS_FLAGS if key in message}
  for key, flag in flags.items():
    if flag not in (0, 1) or isinstance(flag, str):
      raise ValueError(f'turn {number}: "{key}" must be true or false, not {flag!r}')
  if len({bool(flag) for flag in flags.values()}) > 1:
    raise ValueError(f"turn {number}: {_quote(flags)} differ")
  if kind != "gpt":
    if any(flags.values()):
      raise ValueError(f"turn {number}: only answers can be trained: remove the flag")
    return False
  return all(map(bool, flags.values()))


def read_content(
  content: Any, where: str
) -> tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]:
  """Returns the text of a message with placeholders, its media, and their options.

  Args:
    content: A text, or a list of parts, as of OpenAI or Qwen.
    where: Name of the message in errors.

  Raises:
    ValueError: A part is neither a text, an image nor a video.
  """
  if not isinstance(content, list | dict):
    return read_text(content, where), (), ()
  pieces: list[str] = []
  media: list[tuple[str, Any]] = []
  options: list[tuple[str, Any]] = []
  for part in content if isinstance(content, list) else [content]:
    if isinstance(part, str):
      part = {"type": "text", "text": part}
    if not isinstance(part, dict):
      raise ValueError(f"{where}: a part must be an object, not {part!r}")
    part = {key: value for key, value in part.items() if value is not None}
    kind = _find_part_kind(part, where)
    if kind == "text":
      pieces.append(read_text(part.get("text", part.get("content")), where))
      continue
    pieces.append(f"\n<{kind}>\n")
    named = _find_part_name(part, kind)
    if named:
      media.append((kind, named))
    options += [
      (key, part[key]) for key in ("video_start", "video_end", "start", "end")
      if key in part
    ]  # fmt: skip
  return "".join(pieces), tuple(media), tuple(options)


def _find_part_kind(part: RecordRow, where: str) -> str:
  """Returns "text", "image" or "video"."""
  name = part.get("type")
  for kind in ("text", "image", "video"):
    if name in (kind, f"{kind}_url", f"input_{kind}", f"output_{kind}"):
      return kind
    if name is None and kind in part:
      return kind
  raise ValueError(f"{where} has a part of type {name!r}: only text, image and video")


def _find_part_name(part: RecordRow, kind: str) -> Any:
  """Returns the file, frames or bytes of a part; None if the row names them."""
  keys = (kind, f"{kind}_url", "path", "url", "source", f"{kind}s")
  named = next((part[key] for key in keys if part.get(key)), None)
  if isinstance(named, dict) and named.get("type") == "base64":
    return f"data:;base64,{named.get('data')}"
  return named.get("url") or named if isinstance(named, dict) else named


def read_text(value: Any, where: str) -> str:
  """Returns a text, or a number as text.

  Raises:
    ValueError: The value is neither, or contains invalid characters.
  """
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value)
  if value is None:
    raise ValueError(f"{where} has no text")
  if not isinstance(value, str):
    raise ValueError(f"{where} must be a text, not {value!r}")
  return templates.check_plain_text(value)


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


# Turns.


def join_turns(
  messages: Sequence[Message], *, need_answer: bool, has_tags: bool
) -> Conversation:
  """Converts messages to turns.

  A system text becomes the first paragraph of the first question, because templates
  have the system text that the checkpoint was trained with.

  Args:
    messages: The messages.
    need_answer: True to require the last answer.
    has_tags: Whether placeholders within sentences are errors. If a record marks the
      video nowhere else, such a placeholder could be the video's.

  Raises:
    ValueError: The messages do not alternate, or a text is empty or not plain.
  """
  questions: list[str] = []
  answers: list[str] = []
  loss: list[bool] = []
  count, system = 0, ""
  for number, message in enumerate(messages, 1):
    if message.role == "system":
      if number > 1:
        raise ValueError(f"turn {number} is from system: only the first turn may be")
      system = templates.check_plain_text(message.text).strip()
      continue
    is_open = len(questions) > len(answers)
    if is_open == (message.role == "human"):
      raise ValueError(
        f"turn {number} is from {message.role}: human and gpt take turns, human first"
      )
    if message.role == "gpt":
      answers.append(check_answer(message, f"turn {number}"))
      loss.append(message.loss)
      continue
    plain = _read_human(message, number)
    if plain.inline and has_tags and not (count or plain.removed):
      raise ValueError(
        f"turn {number}: {plain.inline} is within a sentence: put it on a line of its "
        "own, or remove it"
      )
    if plain.removed and questions:
      raise ValueError(
        f"turn {number} has the placeholder of a video, which models read before the "
        "first question: move it to the first turn"
      )
    count += plain.removed
    questions.append(plain.text)
  if not questions:
    raise ValueError("it has no question")
  if len(questions) > len(answers):
    if need_answer:
      raise ValueError("it has no answer")
    answers.append("")
    loss.append(True)
  if not all(answers if need_answer else answers[:-1]):
    raise ValueError(f"turn {2 * answers.index('') + 2}: empty answer")
  if need_answer and not any(loss):
    raise ValueError('"loss" excludes all answers')
  if system:
    questions[0] = f"{system}\n\n{questions[0]}"
  return Conversation(list(zip(questions, answers, strict=True)), loss, count)


def _read_human(message: Message, number: int) -> placeholders.PlainText:
  text = templates.check_plain_text(message.text)
  try:
    plain = placeholders.remove_placeholders(text)
  except ValueError as error:
    raise ValueError(f"turn {number}: {error}") from None
  if not plain.text.strip():
    raise ValueError(f"turn {number}: empty question")
  return plain._replace(text=plain.text.strip())


def check_answer(message: Message, where: str) -> str:
  """Returns the text of an answer, which may be "".

  Raises:
    ValueError: The answer contains media or invalid characters.
  """
  if message.media or placeholders.is_placeholder(message.text):
    raise ValueError(f"{where}: an answer must be text, without videos or images")
  return templates.check_plain_text(message.text).strip()


def _quote(names: Any) -> str:
  return " and ".join(f'"{name}"' for name in names)
