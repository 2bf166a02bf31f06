"""Answers held against the hidden truth of the embedded world, exactly."""

from typing import NamedTuple

from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.world import language, scene

DESCRIPTION = "description"  # Kind of the questions that call for one.
REFERENCE = "reference"  # Kind of examples of which nothing but an answer is known.


class TruthVerdict(NamedTuple):
  """What truth says of an answer."""

  kind: str  # Of the question.
  correct: bool | None  # Of a short answer; None for a description.
  claims: int  # Different statements that a description makes; 0 for a short answer.
  unsupported: list[str]  # Those of them that the scene does not bear out, in words.
  recall: float | None  # Share of the true statements that a description makes.


def count_answer_mistakes(example: Example, text: str) -> int | None:
  """How many mistakes an answer makes; None where no scene is known.

  Of a description: statements too many or left out. Of a short answer: 0 or 1.
  """
  truth = example.get("truth") or {}
  if "scene" not in truth:
    return None
  if truth["kind"] == DESCRIPTION:
    return language.count_mistakes(text, scene.scene_from_json(truth["scene"]))
  return 0 if language.is_correct(text, truth["answer"]) else 1


def count_unsupported(example: Example, text: str) -> int | None:
  """How many statements of an answer are wrong, whatever it leaves out; as mistakes."""
  if count_answer_mistakes(example, text) is None:
    return None
  told = judge_answer(example, text)
  return len(told.unsupported) if told.correct is None else int(not told.correct)


def judge_answer(example: Example, text: str) -> TruthVerdict:
  """The verdict on an answer, by the scene or else by the reference answer."""
  truth = example.get("truth") or {}
  if "scene" not in truth:
    answer = example.get("answer", "")
    correct = language.is_correct(text, answer) if answer else None
    return TruthVerdict(REFERENCE, correct, 0, [], None)
  if truth["kind"] != DESCRIPTION:
    correct = language.is_correct(text, truth["answer"])
    return TruthVerdict(truth["kind"], correct, 0, [], None)
  said = list(
    dict.fromkeys(language.split_claims(text))
  )  # Saying a thing twice counts once.
  true = set(
    language.split_claims(
      language.describe_scene(scene.scene_from_json(truth["scene"]))
    )
  )
  wrong = [format_truth(claim) for claim in said if claim not in true]
  recall = len(true.intersection(said)) / len(true)
  return TruthVerdict(DESCRIPTION, None, len(said), wrong, recall)


def format_truth(claim: language.Claim) -> str:
  """A statement as a reader sees it: ("red", "size", "small") -> the red object is
  small.
  """
  subject, aspect, *value = claim
  if aspect == "unreadable":
    return subject
  if aspect == "exists":
    return f"a {subject} object"
  verb = {"size": "is ", "shape": "is a "}.get(aspect, "")
  return f"the {subject} object {verb}{value[0]}"
