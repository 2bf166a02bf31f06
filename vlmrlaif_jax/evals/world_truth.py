"""Compares answers with the exact truth of the embedded world, or with a reference."""

from typing import NamedTuple

from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.feedback import answers

DESCRIPTION = "description"  # Kind of questions that request a description.
REFERENCE = "reference"  # Kind of examples with a reference answer only.


class TruthVerdict(NamedTuple):
  """The verdict of truth on an answer."""

  kind: str  # Kind of the question.
  correct: bool | None  # Whether a short answer is right; None for a description.
  claims: int  # Number of distinct statements of a description; 0 for a short answer.
  unsupported: list[str]  # Statements that are not true of the scene, in words.
  recall: float | None  # Share of the true statements that the description makes.

  def compute_f1(self) -> float:
    """Returns the harmonic mean of recall and the share of true statements."""
    if not self.recall:
      return 0.0
    precision = 1 - len(self.unsupported) / self.claims
    return 2 * precision * self.recall / (precision + self.recall)


def count_answer_mistakes(example: Example, text: str) -> int | None:
  """Returns the number of mistakes of an answer, None without a scene.

  Mistakes of a description are its wrong statements and the true ones that it omits. A
  short answer has 0 or 1.
  """
  truth = example.get("truth") or {}
  if "scene" not in truth:
    return None
  if truth["kind"] == DESCRIPTION:
    return language.count_mistakes(text, scene.scene_from_json(truth["scene"]))
  return 0 if language.is_correct(text, truth["answer"]) else 1


def count_unsupported(example: Example, text: str) -> int | None:
  """Returns the number of wrong statements of an answer, None without a scene."""
  if count_answer_mistakes(example, text) is None:
    return None
  verdict = judge_answer(example, text)
  return (
    len(verdict.unsupported) if verdict.correct is None else int(not verdict.correct)
  )


def judge_answer(example: Example, text: str) -> TruthVerdict:
  """Returns the verdict on an answer, by the scene or else by the reference answer."""
  truth = example.get("truth") or {}
  if "scene" not in truth:
    answer = example.get("answer", "")
    question = example.get("question", "")
    correct = answers.is_match(text, answer, question) if answer else None
    return TruthVerdict(REFERENCE, correct, 0, [], None)
  if truth["kind"] != DESCRIPTION:
    correct = language.is_correct(text, truth["answer"])
    return TruthVerdict(truth["kind"], correct, 0, [], None)
  claims = [*dict.fromkeys(language.split_claims(text))]  # Repetitions count once.
  reference = language.describe_scene(scene.scene_from_json(truth["scene"]))
  true = set(language.split_claims(reference))
  wrong = [format_truth(claim) for claim in claims if claim not in true]
  recall = len(true.intersection(claims)) / len(true)
  return TruthVerdict(DESCRIPTION, None, len(claims), wrong, recall)


def format_truth(claim: language.Claim) -> str:
  """Formats a statement: ("red", "size", "small") -> "the red object is small"."""
  subject, aspect, *value = claim
  if aspect == "unreadable":
    return subject
  if aspect == "exists":
    return f"a {subject} object"
  verb = {"size": "is ", "shape": "is a "}.get(aspect, "")
  return f"the {subject} object {verb}{value[0]}"
