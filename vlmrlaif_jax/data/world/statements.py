"""A small rule-based splitter for what is said of the embedded world's videos.

It stands in for the language models that RLAIF-V (2405.17220) splits answers and
rewrites claims with, and knows nothing of the truth: each claim goes with the question
of the world that it answers.
"""

import re

from vlmrlaif_jax.data.world.language import SENTENCE, make_attribute_questions
from vlmrlaif_jax.data.world.scene import EVENTS, PALETTE, RADIUS, SHAPES

_OBJECT = rf"the (?P<color>{'|'.join(PALETTE)}) object"
_EVENT = "|".join(EVENTS)
_VALUES = {  # What a sentence about one object may say of each aspect.
  "shape": "|".join(SHAPES),
  "size": "|".join(RADIUS),
  "motion": r"stays still|moves \w+",
  "events": rf"(?:{_EVENT})(?:, then (?:{_EVENT}))*",
}


def split_statements(question: str, answer: str) -> list[tuple[str, str]]:
  """The claims of an answer, each as (a question, what the answer says to it).

  A sentence that names an object also claims that there is one. What is of no known
  form is one claim, as the answer to what was asked.
  """
  said = [part.strip() for part in answer.split(".")]
  made = [claim for part in said if part for claim in _of_sentence(question, part)]
  return list(dict.fromkeys(made))


def _of_sentence(question: str, sentence: str) -> list[tuple[str, str]]:
  plain = sentence.lower()
  described = SENTENCE.match(plain)
  if described:
    return _of_description(described)
  denied = re.fullmatch(rf"there is no ({'|'.join(PALETTE)}) object", plain)
  if denied:  # To another question, perhaps; this is what it answers.
    return [(f"Is there a {denied[1]} object?", f"No, {plain}.")]
  there = re.search(_OBJECT, plain)
  if not there:
    return [(question, f"{sentence}.")]
  color = there["color"]
  for aspect, values in _VALUES.items():
    asked, told = make_attribute_questions(color, aspect, f"({values})")
    if re.fullmatch(told.lower(), f"{plain}."):
      question = asked
  return [_exists(color), (question, f"{sentence}.")]


def _of_description(found: re.Match) -> list[tuple[str, str]]:
  color, events = found["color"], found["events"].removeprefix(", then ")
  said = [
    make_attribute_questions(color, aspect, found[aspect])
    for aspect in ("size", "shape", "motion")
  ]
  return [
    _exists(color),
    *said,
    *([make_attribute_questions(color, "events", events)] if events else []),
  ]


def _exists(color: str) -> tuple[str, str]:
  return f"Is there a {color} object?", f"Yes, there is a {color} object."
