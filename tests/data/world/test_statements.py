"""Answers of the embedded world, split by rules."""

import numpy as np
import pytest

from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.data.world.statements import split_statements

RED = ("Is there a red object?", "Yes, there is a red object.")


def test_sentence_of_a_description_is_a_claim_for_each_aspect():
  said = "The small red ring moves left, then stops, then vanishes."
  assert split_statements("What happens in the video?", said) == [
    RED,
    ("How large is the red object?", "The red object is small."),
    ("What shape is the red object?", "The red object is a ring."),
    ("Which way does the red object move at first?", "The red object moves left."),
    ("What happens to the red object?", "The red object stops, then vanishes."),
  ]


@pytest.mark.parametrize(
  ("question", "answer", "claim"),
  [
    ("What shape is the red object?", "The red object is a ring.", None),
    ("How large is the red object?", "The red object is large.", None),
    ("Which way does the red object move at first?", "The red object stays still.",
     None),
    ("What happens to the red object?", "The red object turns gray.", None),
    ("What happens to the red object?", "Nothing happens to the red object.", None),
    # What it says is no answer to what was asked.
    ("How large is the red object?", "The red object is a ring.",
     ("What shape is the red object?", "The red object is a ring.")),
  ],
)  # fmt: skip
def test_answer_about_an_object_also_claims_that_there_is_one(question, answer, claim):
  assert split_statements(question, answer) == [RED, claim or (question, answer)]


@pytest.mark.parametrize(
  ("question", "answer", "claim"),
  [
    ("How many objects are there?", "There are two objects.", None),
    ("Is there a red object?", "No, there is no red object.", None),
    ("Is there a red object?", "Yes, there is a red object.", None),
    ("What shape is the red object?", "There is no red object.",
     ("Is there a red object?", "No, there is no red object.")),
    ("What happens in the video?", "It rains", ("What happens in the video?",
     "It rains.")),
  ],
)  # fmt: skip
def test_other_sentences_are_one_claim(question, answer, claim):
  assert split_statements(question, answer) == [claim or (question, answer)]


def test_what_is_said_twice_is_one_claim():
  twice = "The small red ring moves left. The large red ring moves left."
  made = split_statements("What happens in the video?", twice)
  assert len(made) == len(set(made)) == 5


@pytest.mark.parametrize("answer", ["", " . ", "..."])
def test_nothing_said_is_no_claim(answer):
  assert split_statements("What happens in the video?", answer) == []


def test_all_that_is_true_of_a_scene_answers_a_question_about_it():
  rng = np.random.default_rng(0)
  for _ in range(50):
    seen = scene.sample_scene(rng)
    made = split_statements(language.DESCRIBE_EVENTS, language.describe_scene(seen))
    colors = {item.color for item in seen.objects}
    assert len(made) == sum(4 + bool(item.events) for item in seen.objects)
    assert {a.split()[4] for q, a in made if q.startswith("Is there")} == colors
    for question in language.make_questions(seen, rng).values():
      if question.kind in ("attribute", "motion") or (
        question.kind == "event" and "Nothing" not in question.answer
      ):
        assert (question.question, question.answer) in made
