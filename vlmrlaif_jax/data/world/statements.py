"""A small rule-based splitter for what is said of the embedded world's videos.

It stands in for the language models that RLAIF-V (2405.17220) splits answers and
rewrites claims with, and knows nothing of the truth: each claim goes with the question
of the world that it answers.
"""

import re

from vlmrlaif_jax.data.world.language import SENTENCE
from vlmrlaif_jax.data.world.scene import EVENTS, PALETTE, RADIUS, SHAPES

_OBJECT = rf"the (?P<color>{'|'.join(PALETTE)}) object"
_ASKED = (  # What a sentence about one object says, and what asks for it.
  (rf"{_OBJECT} is a ({'|'.join(SHAPES)})", "What shape is the {color} object?"),
  (rf"{_OBJECT} is ({'|'.join(RADIUS)})", "How large is the {color} object?"),
  (
    rf"{_OBJECT} (stays still|moves \w+)",
    "Which way does the {color} object move at first?",
  ),
  (
    rf"{_OBJECT} ({'|'.join(EVENTS)})(, then ({'|'.join(EVENTS)}))*",
    "What happens to the {color} object?",
  ),
)


def statements(question: str, answer: str) -> list[tuple[str, str]]:
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
  there = re.search(_OBJECT, plain)
  claims = [_exists(there["color"])] if there else []
  for form, asked in _ASKED:
    if there and re.fullmatch(form, plain):
      return [*claims, (asked.format(color=there["color"]), f"{sentence}.")]
  denied = re.fullmatch(rf"there is no ({'|'.join(PALETTE)}) object", plain)
  if denied:  # To another question, perhaps; this is what it answers.
    return [(f"Is there a {denied[1]} object?", f"No, {plain}.")]
  return [*claims, (question, f"{sentence}.")]


def _of_description(found: re.Match) -> list[tuple[str, str]]:
  color = found["color"]
  name = f"The {color} object"
  claims = [
    _exists(color),
    (f"How large is the {color} object?", f"{name} is {found['size']}."),
    (f"What shape is the {color} object?", f"{name} is a {found['shape']}."),
    (
      f"Which way does the {color} object move at first?",
      f"{name} {found['motion']}.",
    ),
  ]
  events = found["events"].removeprefix(", then ")
  if events:
    claims.append((f"What happens to the {color} object?", f"{name} {events}."))
  return claims


def _exists(color: str) -> tuple[str, str]:
  return f"Is there a {color} object?", f"Yes, there is a {color} object."
