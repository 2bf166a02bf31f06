"""What pretraining alone says of scenes: single frames, and with mistakes."""

import numpy as np
import pytest

from tools.pretraining import scene_texts
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.data.world.scene import Scene, SceneEvent, SceneObject

RING = SceneObject(
  "ring", "red", "small", "left", 42, 20, (SceneEvent(11, "turns gray"),)
)
SQUARE = SceneObject("square", "green", "large", "still", 50, 50)
HAND_MADE = Scene((RING, SQUARE), background=30, bar=-1, seed=0)

rng = np.random.default_rng(5)
SCENES = [scene.sample_scene(rng) for _ in range(150)]
THIRDS = [(0, 8), (8, 16), (16, 24)]


def test_caption_says_what_a_frame_shows():
  said = [scene_texts.make_caption(HAND_MADE, frame) for frame in (10, 11)]
  assert said == [
    "a small red ring and a large green square",
    "a small gray ring and a large green square",
  ]


@pytest.mark.parametrize(
  "frame, said",
  [
    (
      0,
      "A small red ring at the top center.",
    ),
    (
      23,
      "A small gray ring at the top left.",
    ),
  ],
)
def test_image_is_described_with_places(frame, said):
  other = "A large green square at the bottom right."
  assert scene_texts.describe_image(HAND_MADE, frame) == f"{said} {other}"


def test_questions_about_an_image_have_true_answers():
  rng = np.random.default_rng(0)
  made = dict(
    sum((scene_texts.make_image_questions(HAND_MADE, 23, rng) for _ in range(40)), [])
  )
  true = {
    "Is there a gray object?": "Yes, there is a gray object.",
    "Is there a red object?": "No, there is no red object.",
    "What shape is the gray object?": "The gray object is a ring.",
    "What shape is the green object?": "The green object is a square.",
    "Where is the gray object?": "The gray object is at the top left.",
    "Where is the green object?": "The green object is at the bottom right.",
  }
  assert true.items() <= made.items()


@pytest.mark.parametrize("span", [(0, 24), *THIRDS])
def test_corrupted_description_has_mistakes(span):
  rng = np.random.default_rng(1)
  for each in SCENES:
    said = scene_texts.corrupt(each, rng, errors=1, start=span[0], stop=span[1])
    assert language.count_mistakes(said, each, *span) > 0


def test_corruption_comes_in_every_kind():
  rng = np.random.default_rng(2)
  said = [scene_texts.corrupt(HAND_MADE, rng, errors=1) for _ in range(300)]
  sentences = [len(text.split(". ")) for text in said]
  assert {1, 2, 3} == set(sentences)  # Omitted, changed, invented.
  changed = " ".join(t for t, n in zip(said, sentences, strict=True) if n == 2)
  for what in ("large red ring", "red cross", "blue ring", "moves up", "then stops"):
    assert what in changed
  assert "The small red ring moves left. " in changed


@pytest.mark.parametrize("span", [(0, 24), *THIRDS])
def test_corrupted_description_is_still_readable(span):
  rng = np.random.default_rng(9)
  for each in SCENES * 3:
    said = scene_texts.corrupt(each, rng, errors=1, start=span[0], stop=span[1])
    assert all(claim[1] != "unreadable" for claim in language.split_claims(said)), said


def test_no_corruption_leaves_the_description():
  rng = np.random.default_rng(3)
  said = scene_texts.corrupt(HAND_MADE, rng, errors=0)
  assert said == language.describe_scene(HAND_MADE)
