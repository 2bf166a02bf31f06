"""Rule-based splitting of answers about the embedded world into claims.

`split_statements` replaces the language models with which RLAIF-V (2405.17220) splits
answers and rewrites claims. It does not use the ground truth. Each claim is paired with
the question that it answers.
"""

import re

from vlmrlaif_jax.data.world.language import SENTENCE, make_attribute_questions
from vlmrlaif_jax.data.world.scene import EVENTS, PALETTE, RADIUS, SHAPES

_OBJECT = rf"the (?P<color>{'|'.join(PALETTE)}) object"
_EVENT = "|".join(EVENTS)
_VALUES = {  # Patterns of the values of each aspect.
  "shape": "|".join(SHAPES),
  "size": "|".join(RADIUS),
  "motion": r"stays still|moves \w+",
  "events": rf"(?:{_EVENT})(?:, then (?:{_EVENT}))*",
}


def split_statements(question: str, answer: str) -> list[tuple[str, str]]:
  """Returns the claims of an answer as (question, answer to that question) pairs.

  A sentence that names an object also claims that the object exists. A sentence of
  unknown form becomes one claim, which answers the original question.

  Args:
    question: The original question.
    answer: The answer to split.
  """
  parts = [part.strip() for part in answer.split(".")]
  claims = [
    claim for part in parts if part for claim in _split_sentence(question, part)
  ]
  return list(dict.fromkeys(claims))


def _split_sentence(question: str, sentence: str) -> list[tuple[str, str]]:
  plain = sentence.lower()
  description = SENTENCE.match(plain)
  if description:
    return _split_description(description)
  denial = re.fullmatch(rf"there is no ({'|'.join(PALETTE)}) object", plain)
  if denial:  # The original question may be another one.
    return [(f"Is there a {denial[1]} object?", f"No, {plain}.")]
  mention = re.search(_OBJECT, plain)
  if not mention:
    return [(question, f"{sentence}.")]
  color = mention["color"]
  for aspect, values in _VALUES.items():
    matching, pattern = make_attribute_questions(color, aspect, f"({values})")
    if re.fullmatch(pattern.lower(), f"{plain}."):
      question = matching
  return [_claim_existence(color), (question, f"{sentence}.")]


def _split_description(match: re.Match) -> list[tuple[str, str]]:
  color, events = match["color"], match["events"].removeprefix(", then ")
  claims = [
    make_attribute_questions(color, aspect, match[aspect])
    for aspect in ("size", "shape", "motion")
  ]
  return [
    _claim_existence(color),
    *claims,
    *([make_attribute_questions(color, "events", events)] if events else []),
  ]


def _claim_existence(color: str) -> tuple[str, str]:
  return f"Is there a {color} object?", f"Yes, there is a {color} object."
