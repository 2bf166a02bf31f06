"""Messages of conversations: roles, texts, media and loss flags."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.formats import placeholders

RecordRow: TypeAlias = Mapping[str, Any]

ROLES: dict[str, Literal["system", "human", "gpt"]] = {
  **dict.fromkeys(("human", "user"), "human"),
  **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "gpt"),
  **dict.fromkeys(("system", "developer"), "system"),
}
LOSS_FLAGS = ("loss", "train", "weight", "loss_weight")  # Keys of a message.
_SCALES = ("mask", "loss_scale")  # Keys of a message whose 0 has a meaning as well.
# Keys of a message that change its meaning and are not supported, and the remedy.
_REJECTED = {
  **dict.fromkeys(
    ("tool_calls", "function_call", "tool_call_id"), "the models call no tools"
  ),
  **dict.fromkeys(
    ("reasoning_content", "reasoning", "thinking"), "write it into the text"
  ),
  **dict.fromkeys(_SCALES, 'give "loss" as true or false'),
  **dict.fromkeys(("prefix", "partial"), "the models continue no answers"),
  **dict.fromkeys(("audio", "audios"), "the models read no audio"),
}
_MEDIA = ("video", "videos", "image", "images")


class Message(NamedTuple):
  """A message of a conversation."""

  role: Literal["system", "human", "gpt"]
  text: str  # Contains placeholders of media, and PART_MARKS for parts that are media.
  media: tuple[tuple[str, Any], ...] = ()  # ("video" or "image", name) of its parts.
  loss: bool = True  # False to exclude an answer from the loss.
  options: tuple[tuple[str, Any], ...] = ()  # Options of a video: its part in time.


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
    if message.get(key) or (key in _SCALES and key in message):
      raise ValueError(f'turn {number} has "{key}": {remedy}')
  text, media, options = read_content(
    message.get("value", message.get("content")), f"turn {number}"
  )
  for key in _MEDIA:
    named = message.get(key) or []
    names = named if isinstance(named, list) else [named]
    media_kind = key.removesuffix("s")
    media += tuple((media_kind, name) for name in names)
    if not placeholders.find_placeholders(text):
      text = templates.PART_MARKS[media_kind] * len(names) + text
  loss = _read_loss(message, kind, number)
  return Message(kind, text, media, loss, options)


def _read_loss(message: RecordRow, kind: str, number: int) -> bool:
  flags = {key: message[key] for key in LOSS_FLAGS if key in message}
  for key, flag in flags.items():
    if flag not in (0, 1) or isinstance(flag, str):
      raise ValueError(f'turn {number}: "{key}" must be true or false, not {flag!r}')
  if len({bool(flag) for flag in flags.values()}) > 1:
    raise ValueError(f"turn {number}: {quote_keys(flags)} differ")
  if kind != "gpt":
    if any(flags.values()):
      raise ValueError(f"turn {number}: only answers can be trained: remove the flag")
    return False
  return all(map(bool, flags.values()))


def read_content(
  content: Any, where: str
) -> tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]:
  """Returns the text of a message with PART_MARKS, its media, and their options.

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
    pieces.append(templates.PART_MARKS[kind])
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


def check_answer(message: Message, where: str) -> str:
  """Returns the text of an answer, which may be "".

  Raises:
    ValueError: The answer contains media or invalid characters.
  """
  text = message.text
  if message.media or placeholders.has_part(text) or placeholders.is_placeholder(text):
    raise ValueError(f"{where}: an answer must be text, without videos or images")
  return templates.check_plain_text(text).strip()


def quote_keys(names: Iterable[str]) -> str:
  """Returns keys in quotes, joined by "and"."""
  return " and ".join(f'"{name}"' for name in names)
