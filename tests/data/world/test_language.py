"""What is said of scenes, against checks that know nothing of how it is said."""

import re

import numpy as np
import pytest

from vlmrlaif_jax.data.world import builder, language, scene
from vlmrlaif_jax.data.world.scene import Scene, SceneEvent, SceneObject

RING = SceneObject(
  "ring", "red", "small", "left", 42, 20, (SceneEvent(11, "turns gray"),)
)
SQUARE = SceneObject("square", "green", "large", "still", 50, 50)
HAND_MADE = Scene((RING, SQUARE), background=30, bar=-1, seed=0)
RING_SAYS = "The small red ring moves left, then turns gray."
SQUARE_SAYS = "The large green square stays still."

rng = np.random.default_rng(5)
SCENES = [scene.sample_scene(rng) for _ in range(150)]


def test_description_of_a_scene_made_by_hand():
  assert language.describe_scene(HAND_MADE) == f"{RING_SAYS} {SQUARE_SAYS}"


@pytest.mark.parametrize(
  "span, said",
  [
    ((0, 8), "The small red ring moves left."),
    ((8, 16), "The small red ring moves left, then turns gray."),
    ((16, 24), "The small gray ring moves left."),
  ],
)
def test_part_of_a_clip_is_described_as_it_looks_there(span, said):
  assert language.describe_scene(HAND_MADE, *span) == f"{said} {SQUARE_SAYS}"


def unsupported(text, scene):
  """The statements of a text that are not among those of the true description."""
  true = set(language.split_claims(language.describe_scene(scene)))
  return [claim for claim in language.split_claims(text) if claim not in true]


def test_description_has_only_known_claims():
  for each in SCENES:
    said = language.describe_scene(each)
    assert all(claim[1] != "unreadable" for claim in language.split_claims(said))


@pytest.mark.parametrize(
  "text, wrong, count",
  [
    (f"{RING_SAYS} {SQUARE_SAYS} The small blue ring moves up.", 4, 4),  # Invented.
    (RING_SAYS, 0, 4),  # Left out.
    (f"The small white ring moves left, then turns gray. {SQUARE_SAYS}", 5, 10),
    (f"The small red cross moves left, then turns gray. {SQUARE_SAYS}", 1, 2),
    (f"The large red ring moves left, then turns gray. {SQUARE_SAYS}", 1, 2),
    (f"The small red ring moves up, then turns gray. {SQUARE_SAYS}", 1, 2),
    (f"The small red ring moves left, then vanishes. {SQUARE_SAYS}", 1, 2),
    (f"The small red ring moves left. {SQUARE_SAYS}", 0, 1),  # An event dropped,
    (f"{RING_SAYS} The large green square stays still, then stops.", 1, 1),  # added.
    (f"{RING_SAYS} {SQUARE_SAYS} {SQUARE_SAYS}", 0, 4),  # Said twice.
    (f"{RING_SAYS} {SQUARE_SAYS} Hello there.", 1, 1),
    (f"{SQUARE_SAYS} {RING_SAYS}".upper(), 0, 0),  # Neither order nor case matters.
    ("", 0, 9),
  ],
)
def test_each_kind_of_mistake_is_found(text, wrong, count):
  assert len(unsupported(text, HAND_MADE)) == wrong
  assert language.count_mistakes(text, HAND_MADE) == count


def test_invented_object_is_not_in_the_scene():
  rng = np.random.default_rng(4)
  for each in SCENES:
    (color,) = {
      claim[0] for claim in language.split_claims(language.invent_sentence(each, rng))
    }
    assert color not in [item.color for item in each.objects]


@pytest.mark.parametrize(
  "said, answer, right",
  [
    ("the ring IS red", "The ring is red.", True),
    ("  Yes there is a ring . ", "Yes, there is a ring.", True),
    ("The ring is blue.", "The ring is red.", False),
    ("The ring is red. It moves.", "The ring is red.", False),
    ("", "The ring is red.", False),
    ("3", "5", False),
    ("At 3 pm.", "at 3 PM", True),
    ("猫", "犬", False),
    ("Élan", "élan", True),
  ],
)
def test_is_right_ignores_case_and_stops_and_nothing_else(said, answer, right):
  assert language.is_correct(said, answer) is right


# Questions: the right answer by looking at the scene ---------------------------------


def look(seen, question):
  """The answer to a question, by the scene alone: words that it must hold."""
  named = re.findall(r"\b(red|green|blue|yellow|white|purple)\b", question)
  there = {item.color: item for item in seen.objects}
  if question.startswith("How many"):
    still = [item for item in seen.objects if item.motion == "still"]
    count = len(seen.objects) - (len(still) if "move" in question else 0)
    return ["no", "one", "two", "three"][count]
  if question.startswith("Is there"):
    return "yes" if named[0] in there else "no"
  if question.startswith("What happens first"):
    return first(seen, question)
  if named[0] not in there:
    return "there is no"
  item = there[named[0]]
  if question.startswith("What shape"):
    return item.shape
  if question.startswith("How large"):
    return item.size
  if question.startswith("Which way"):
    return item.motion
  if question.startswith("What happens to"):
    return " then ".join(watch(item)) or "nothing"
  raise AssertionError(question)


def watch(item):
  """What happens to an object, frame by frame."""
  seen = []
  for frame in range(1, scene.SCENE_FRAMES):
    moves = lambda t: (
      scene.get_position_at(item, t + 1) != scene.get_position_at(item, t)
    )
    if moves(frame - 1) and not moves(frame):
      seen.append("stops")
    if scene.get_color_at(item, frame - 1) != scene.get_color_at(item, frame) == "gray":
      seen.append("turns gray")
    if any(e == (frame, "vanishes") for e in item.events):
      seen.append("vanishes")
  return seen


def first(seen, question):
  """Which of two happenings comes first, by the frames of the events."""
  named = question.removeprefix("What happens first, ").removesuffix("?")
  frames = {
    f"the {item.color} object {event.kind}": event.frame
    for item in seen.objects
    for event in item.events
  }
  return min(named.split(" or "), key=frames.__getitem__)


def asked(kind):
  """(scene, question) of a kind, over all scenes."""
  rng = np.random.default_rng(6)
  made = [
    (each, language.make_questions(each, rng)) for each in SCENES for _ in range(3)
  ]
  return [(each, found[kind]) for each, found in made if kind in found]


@pytest.mark.parametrize("kind", builder.PROMPT_MIX)
def test_right_answer_is_what_the_scene_shows(kind):
  found = asked(kind)
  assert len(found) > 20
  for seen, question in found:
    said = re.findall(r"\w+", question.answer.lower())
    for word in look(seen, question.question).split():
      assert word in said, (seen, question)


@pytest.mark.parametrize("kind", builder.PROMPT_MIX)
def test_wrong_answers_are_wrong_and_different(kind):
  for _, question in asked(kind):
    assert question.kind == kind and question.wrong
    said = [question.answer, *question.wrong]
    assert len({text.lower() for text in said}) == len(said)
    assert not any(
      language.is_correct(text, question.answer) for text in question.wrong
    )


def test_false_premise_asks_of_what_is_not_there():
  for seen, question in asked("false_premise"):
    color = question.answer.removeprefix("There is no ").removesuffix(" object.")
    assert f" {color} object" in question.question
    assert color not in [item.color for item in seen.objects]


def test_careless_answer_goes_along_with_false_premises_at_a_rate():
  rng = np.random.default_rng(7)
  said = [
    language.make_careless_answer(question, rng, denial=0.0) in question.wrong
    for _, question in asked("false_premise") * 5
  ]
  assert 0.6 < np.mean(said) < 0.8


def test_careless_answer_is_right_otherwise():
  rng = np.random.default_rng(7)
  for _, question in asked("count"):
    assert language.make_careless_answer(question, rng, denial=0.0) == question.answer


def test_careless_description_adds_what_is_not_there_at_a_rate():
  rng = np.random.default_rng(8)
  said = [
    language.make_careless_description(each, rng, rate=0.65, omission=0.0)
    for each in SCENES
  ]
  wrong = [len(unsupported(text, each))
           for text, each in zip(said, SCENES, strict=True)]  # fmt: skip
  assert set(wrong) == {0, 4}
  assert 0.5 < np.mean([n > 0 for n in wrong]) < 0.8
