"""Conversion of messages to (question, answer) pairs."""

from collections.abc import Sequence
from typing import NamedTuple

from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.formats import placeholders
from vlmrlaif_jax.data.formats.messages import Message, check_answer


class Conversation(NamedTuple):
  """A conversation as turns."""

  turns: list[tuple[str, str]]  # (question, answer); the last answer may be "".
  loss: list[bool]  # Whether the loss includes the answer of each turn.
  placeholders: int  # Number of placeholders that were removed.


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
  plain = [
    _read_human(message, first + 2 * i) for i, message in enumerate(messages[::2])
  ]
  count = plain[0].removed
  if plain[0].inline and has_tags and not count:
    raise ValueError(
      f"turn {first}: {plain[0].inline} is within a sentence: put it on a line of its "
      "own, or remove it"
    )
  for i, text in enumerate(plain[1:], 1):
    if text.removed or messages[2 * i].media:
      raise ValueError(
        f"turn {first + 2 * i} has a video, which models read before the first "
        "question: move it to the first turn"
      )
  answers, loss = _read_answers(messages, need_answer=need_answer, first=first)
  questions = [text.text for text in plain]
  if system:
    questions[0] = f"{system}\n\n{questions[0]}"
  return Conversation(list(zip(questions, answers, strict=True)), loss, count)


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


def _read_human(message: Message, number: int) -> placeholders.PlainText:
  text = templates.check_plain_text(message.text)
  try:
    plain = placeholders.remove_placeholders(text)
  except ValueError as error:
    raise ValueError(f"turn {number}: {error}") from None
  if not plain.text.strip():
    raise ValueError(f"turn {number}: empty question")
  return plain._replace(text=plain.text.strip())
