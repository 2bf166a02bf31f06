"""Conversion of messages to (question, answer) pairs."""

from collections.abc import Sequence
from typing import NamedTuple

from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.formats import placeholders, places
from vlmrlaif_jax.data.formats.media import Medium
from vlmrlaif_jax.data.formats.messages import Message, check_answer
from vlmrlaif_jax.data.video import MediaList


class Conversation(NamedTuple):
  """A conversation as turns."""

  turns: list[tuple[str, str]]  # (question, answer); the last answer may be "".
  loss: list[bool]  # Whether the loss includes the answer of each turn.
  video: str | list[str] | MediaList  # Video or videos, in the order of their places.


def join_turns(
  messages: Sequence[Message],
  media: Sequence[Medium],
  *,
  need_answer: bool,
  has_tags: bool,
) -> Conversation:
  """Converts messages to turns.

  A system text becomes the first paragraph of the first question, because templates
  have the system text that the checkpoint was trained with.

  Args:
    messages: The messages.
    media: Videos and images of the record.
    need_answer: True to require the last answer.
    has_tags: Whether placeholders within sentences may stand for videos; see
      places.place_media.

  Raises:
    ValueError: The messages do not alternate, a text is empty or not plain, or its
      placeholders are not those of the media.
  """
  system, messages = _split_system(messages)
  first = 1 + bool(system)  # Number of the first turn after the system text.
  roles = [message.role for message in messages]
  for number, role in enumerate(roles):
    if role != ("human", "gpt")[number % 2]:
      raise ValueError(
        f"turn {first + number} is from {role}: human and gpt take turns, human first"
      )
  if not messages:
    raise ValueError("it has no question")
  texts = [message.text for message in messages[::2]]
  questions, video = places.place_media(texts, media, has_tags=has_tags, first=first)
  for i, question in enumerate(questions):
    if not question.replace(templates.MEDIA_MARK, "").strip():
      raise ValueError(f"turn {first + 2 * i}: empty question")
  answers, loss = _read_answers(messages, need_answer=need_answer, first=first)
  if system:
    questions[0] = f"{system}\n\n{questions[0]}"
  return Conversation(list(zip(questions, answers, strict=True)), loss, video)


def _split_system(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
  """Returns the system text, or "", and the other messages."""
  if not messages or messages[0].role != "system":
    return "", messages
  if messages[0].media or placeholders.remove_placeholders(messages[0].text).removed:
    raise ValueError("turn 1: the system text must have no video: move it to turn 2")
  return templates.check_plain_text(messages[0].text).strip(), messages[1:]


def _read_answers(
  messages: Sequence[Message], *, need_answer: bool, first: int
) -> tuple[list[str], list[bool]]:
  """Returns the answers, the last of which may be "", and their loss flags."""
  answers = [
    check_answer(message, f"turn {first + 2 * i + 1}")
    for i, message in enumerate(messages[1::2])
  ]
  loss = [message.loss for message in messages[1::2]]
  if len(messages) % 2:
    if need_answer:
      raise ValueError("it has no answer")
    answers.append("")
    loss.append(True)
  if not all(answers if need_answer else answers[:-1]):
    raise ValueError(f"turn {first + 2 * answers.index('') + 1}: empty answer")
  if need_answer and not any(loss):
    raise ValueError('"loss" excludes all answers')
  return answers, loss
