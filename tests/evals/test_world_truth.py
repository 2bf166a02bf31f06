"""Verdicts on answers made by hand."""

import pytest

from vlmrlaif_jax.data.world import scene
from vlmrlaif_jax.data.world.scene import Scene, SceneEvent, SceneObject
from vlmrlaif_jax.evals import world_truth

RING = SceneObject(
  "ring", "red", "small", "left", 42, 20, (SceneEvent(11, "turns gray"),)
)
SQUARE = SceneObject("square", "green", "large", "still", 50, 50)
SEEN = Scene((RING, SQUARE), background=30, bar=-1, seed=0)
RING_SAYS = "The small red ring moves left, then turns gray."
SQUARE_SAYS = "The large green square stays still."


def example(kind, answer=""):
  truth = {"scene": scene.scene_to_json(SEEN), "kind": kind, "answer": answer}
  return {"id": "x", "video": "x.mp4", "question": "?", "answer": "", "source": "",
          "turns": [], "truth": truth}  # fmt: skip


def reference(answer):
  return {"id": "x", "video": "x.mp4", "question": "?", "answer": answer, "source": "",
          "turns": []}  # fmt: skip


DESCRIBED = example("description")


def test_true_description_has_no_unsupported_claim():
  found = world_truth.judge_answer(DESCRIBED, f"{RING_SAYS} {SQUARE_SAYS}")
  assert found == ("description", None, 9, [], 1.0)


def test_invented_and_changed_things_are_named():
  said = "The small red ring moves right. The large blue cross stays still, then stops."
  found = world_truth.judge_answer(DESCRIBED, said)
  assert found.claims == 9
  assert found.unsupported == [
    "the red object moves right",
    "a blue object",
    "the blue object is large",
    "the blue object is a cross",
    "the blue object stays still",
    "the blue object stops",
  ]
  assert found.recall == 3 / 9  # There is a red object, it is small, it is a ring.


def test_saying_it_twice_changes_no_share():
  wrong = "The small red ring moves right."
  once, twice = (world_truth.judge_answer(DESCRIBED, wrong * n) for n in (1, 2))
  assert once == twice


def test_silence_claims_nothing():
  assert world_truth.judge_answer(DESCRIBED, "") == ("description", None, 0, [], 0.0)


def test_babble_is_one_unsupported_claim():
  found = world_truth.judge_answer(DESCRIBED, "Ring ring ring")
  assert found == ("description", None, 1, ["ring ring ring"], 0.0)


@pytest.mark.parametrize("said, correct", [("the ring is RED", True), ("Red.", False)])
def test_short_answer_is_right_or_wrong(said, correct):
  found = world_truth.judge_answer(example("attribute", "The ring is red."), said)
  assert found == ("attribute", correct, 0, [], None)


@pytest.mark.parametrize("said, correct", [("three cats", True), ("two cats", False)])
def test_users_example_is_held_against_its_answer(said, correct):
  found = world_truth.judge_answer(reference("Three cats."), said)
  assert found == ("reference", correct, 0, [], None)


def test_example_without_any_answer_has_no_verdict():
  assert world_truth.judge_answer(reference(""), "three cats").correct is None


@pytest.mark.parametrize(
  "said, count",
  [
    (f"{RING_SAYS} {SQUARE_SAYS}", 0),
    (RING_SAYS, 4),  # The green object, its size, shape and motion are left out.
    (f"{RING_SAYS} {SQUARE_SAYS} {SQUARE_SAYS}", 4),  # Said twice.
    (f"The small red ring moves left. {SQUARE_SAYS}", 1),
    (f"The small red cross moves left, then turns gray. {SQUARE_SAYS}", 2),
  ],
)
def test_mistakes_of_a_description(said, count):
  assert world_truth.count_answer_mistakes(DESCRIBED, said) == count


def test_mistakes_of_a_short_answer():
  asked = example("attribute", "The ring is red.")
  assert [
    world_truth.count_answer_mistakes(asked, x) for x in ("The ring is red", "No.")
  ] == [0, 1]


def test_mistakes_are_unknown_without_a_scene():
  assert world_truth.count_answer_mistakes(reference("Three cats."), "two cats") is None
