"""Language of the embedded world: descriptions, questions, right and wrong answers.

An object is named by its initial color: "the red object".
"""

import collections
import re
from typing import NamedTuple

import numpy as np

from vlmrlaif_jax.data.world.scene import (
  COLORS,
  EVENTS,
  MOTIONS,
  PALETTE,
  RADIUS,
  SCENE_FRAMES,
  SHAPES,
  Scene,
  SceneObject,
  get_color_at,
  get_motion_at,
)

DESCRIBE_EVENTS = "What happens in the video?"
NUMBERS = ("no", "one", "two", "three")

# Real instruction data accepts false premises and describes absent objects. The SFT
# split does so at these rates, so that RL has errors to correct.
CARELESS_PREMISE = 0.7
CARELESS_DESCRIPTION = 0.65
# Real instruction data also misses present objects. Without these errors, the judge
# would see no false denial, and the reward model would prefer every denial.
CARELESS_DENIAL = 0.4
CARELESS_OMISSION = 0.4

Claim = tuple[str, ...]  # (color, "exists") or (color, aspect, value).


class WorldQuestion(NamedTuple):
  """A question with its right answer and plausible wrong ones."""

  kind: str  # A key of builder.PROMPT_MIX.
  question: str
  answer: str
  wrong: tuple[str, ...]


# Descriptions.


def describe_object(item: SceneObject, start: int = 0, stop: int = SCENE_FRAMES) -> str:
  """Describes an object, such as "The small red ring moves left, then vanishes.".

  Args:
    item: The object.
    start: First frame of the described part of the clip.
    stop: Frame after the described part.
  """
  head = f"The {item.size} {get_color_at(item, start)} {item.shape}"
  events = [f", then {e.kind}" for e in item.events if start < e.frame < stop]
  return f"{head} {_format_motion(get_motion_at(item, start))}{''.join(events)}."


def _format_motion(motion: str) -> str:
  return "stays still" if motion == "still" else f"moves {motion}"


MOVES = tuple(_format_motion(motion) for motion in MOTIONS)


def describe_scene(scene: Scene, start: int = 0, stop: int = SCENE_FRAMES) -> str:
  """Describes each object in one sentence, from left to right.

  Args:
    scene: The scene.
    start: First frame of the described part of the clip.
    stop: Frame after the described part.
  """
  return " ".join(describe_object(item, start, stop) for item in scene.objects)


def invent_sentence(scene: Scene, rng: np.random.Generator) -> str:
  """Returns a sentence about an object that is not in the scene."""
  color, shape, size, motion = (
    str(rng.choice(x))
    for x in (find_absent_colors(scene), SHAPES, list(RADIUS), list(MOTIONS))
  )
  return describe_object(SceneObject(shape, color, size, motion, 0, 0))


def find_absent_colors(scene: Scene) -> list[str]:
  """Returns the colors that are the initial color of no object."""
  return [c for c in COLORS if all(c != item.color for item in scene.objects)]


# Questions.

# Question and answer by aspect. The fields are the object's color and the value.
ATTRIBUTE_QUESTIONS = {
  "shape": ("What shape is the {} object?", "The {} object is a {}."),
  "size": ("How large is the {} object?", "The {} object is {}."),
  "motion": ("Which way does the {} object move at first?", "The {} object {}."),
  "events": ("What happens to the {} object?", "The {} object {}."),
}


def make_attribute_questions(color: str, aspect: str, value: str) -> tuple[str, str]:
  """Returns a question about an aspect of an object, and the answer with a value.

  Args:
    color: Initial color of the object.
    aspect: A key of ATTRIBUTE_QUESTIONS.
    value: Value of the aspect in the answer.
  """
  question, answer = ATTRIBUTE_QUESTIONS[aspect]
  return question.format(color), answer.format(color, value)


def make_questions(scene: Scene, rng: np.random.Generator) -> dict[str, WorldQuestion]:
  """Returns one question of each kind that the scene allows, by kind.

  A question of kind "order" requires two events.
  """
  item = scene.objects[rng.integers(len(scene.objects))]
  missing = str(rng.choice(find_absent_colors(scene)))
  questions = [
    _make_attribute_question(item, rng),
    _make_count_question(scene, rng),
    _make_choice("motion", item, "motion", _format_motion(item.motion), MOVES),
    _make_event_question(item),
    _make_presence_question(item.color, missing, rng),
    _make_false_premise(scene, missing, rng),
  ]
  order = _make_order_question(scene, rng)
  return {q.kind: q for q in [*questions, *([order] if order else [])]}


def _deny_object(color: str) -> str:
  return f"There is no {color} object."


def _make_attribute_question(item: SceneObject, rng) -> WorldQuestion:
  if rng.random() < 0.6:
    return _make_choice("attribute", item, "shape", item.shape, SHAPES)
  return _make_choice("attribute", item, "size", item.size, tuple(RADIUS))


def _make_choice(
  kind: str, item: SceneObject, aspect: str, right: str, values: tuple[str, ...]
) -> WorldQuestion:
  """Returns a question about an aspect; its last wrong answer denies the object."""
  ask, answer = make_attribute_questions(item.color, aspect, right)
  wrong = (
    make_attribute_questions(item.color, aspect, value)[1]
    for value in values
    if value != right
  )
  return WorldQuestion(kind, ask, answer, (*wrong, _deny_object(item.color)))


def _make_count_question(scene: Scene, rng) -> WorldQuestion:
  if rng.random() < 0.5:
    number, ask = len(scene.objects), "How many objects are there?"
    say = lambda n: f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {_inflect(n)}."
  else:
    number = sum(item.motion != "still" for item in scene.objects)
    ask = "How many objects move?"
    verb = lambda n: "moves" if n == 1 else "move"
    say = lambda n: f"{NUMBERS[n].title()} {_inflect(n)} {verb(n)}."
  wrong = tuple(say(n) for n in range(4) if n != number)
  return WorldQuestion("count", ask, say(number), wrong)


def _inflect(number: int) -> str:
  return "object" if number == 1 else "objects"


def _make_event_question(item: SceneObject) -> WorldQuestion:
  def say(*kinds):
    if not kinds:
      return f"Nothing happens to the {item.color} object."
    return make_attribute_questions(item.color, "events", ", then ".join(kinds))[1]

  right = say(*(e.kind for e in item.events))
  others = [say(), *map(say, EVENTS)]
  wrong = tuple(answer for answer in others if answer != right)
  return WorldQuestion(
    "event", ATTRIBUTE_QUESTIONS["events"][0].format(item.color), right, wrong
  )


def _make_order_question(scene: Scene, rng) -> WorldQuestion | None:
  """Returns a question about the order of two events; None without two events."""
  events = [
    (e.frame, f"the {item.color} object {e.kind}")
    for item in scene.objects
    for e in item.events
  ]
  pairs = [(a, b) for a in events for b in events if a[0] < b[0]]
  if not pairs:
    return None
  (_, early), (_, late) = pairs[rng.integers(len(pairs))]
  options = [early, late] if rng.random() < 0.5 else [late, early]
  say = lambda what: f"{what[0].upper()}{what[1:]} first."
  ask = f"What happens first, {options[0]} or {options[1]}?"
  return WorldQuestion("order", ask, say(early), (say(late),))


def _make_presence_question(color: str, missing: str, rng) -> WorldQuestion:
  is_present, name = (True, color) if rng.random() < 0.5 else (False, missing)
  yes, no = f"Yes, there is a {name} object.", f"No, there is no {name} object."
  right, wrong = (yes, no) if is_present else (no, yes)
  return WorldQuestion("presence", f"Is there a {name} object?", right, (wrong,))


def _make_false_premise(scene: Scene, missing: str, rng) -> WorldQuestion:
  """Returns a question about an absent object; wrong answers describe another one."""
  other = scene.objects[rng.integers(len(scene.objects))]
  aspects = (
    ("shape", other.shape),
    ("size", other.size),
    ("motion", _format_motion(other.motion)),
  )
  ask, wrong = make_attribute_questions(missing, *aspects[rng.integers(3)])
  return WorldQuestion("false_premise", ask, _deny_object(missing), (wrong,))


# Careless instruction data.


def make_careless_answer(
  question: WorldQuestion, rng: np.random.Generator, *, denial: float = CARELESS_DENIAL
) -> str:
  """Returns an answer as in careless instruction data.

  Args:
    question: The question.
    rng: Source of random numbers.
    denial: Probability that the answer denies a present object.
  """
  if question.kind == "false_premise" and rng.random() < CARELESS_PREMISE:
    return question.wrong[0]
  # The last wrong answer denies the object.
  if denial and question.kind in ("attribute", "motion") and rng.random() < denial:
    return question.wrong[-1]
  return question.answer


def make_careless_description(
  scene: Scene,
  rng: np.random.Generator,
  *,
  rate: float = CARELESS_DESCRIPTION,
  omission: float = CARELESS_OMISSION,
) -> str:
  """Returns a description as in careless instruction data.

  Args:
    scene: The scene.
    rng: Source of random numbers.
    rate: Probability of a sentence about an absent object.
    omission: Probability that the last of several objects is omitted.
  """
  sentences = [describe_object(item) for item in scene.objects]
  if omission and len(sentences) > 1 and rng.random() < omission:
    sentences.pop()
  if rng.random() < rate:
    sentences.append(invent_sentence(scene, rng))
  return " ".join(sentences)


# Ground truth.

SENTENCE = re.compile(
  rf"^the (?P<size>{'|'.join(RADIUS)}) (?P<color>{'|'.join(PALETTE)}) "
  rf"(?P<shape>{'|'.join(SHAPES)}) "
  r"(?P<motion>stays still|moves (?:left|right|up|down))(?P<events>(?:, then [^,]+)*)$"
)


def split_claims(text: str) -> list[Claim]:
  """Splits a description into claims.

  A sentence of unknown form becomes one claim, which no scene supports.
  """
  claims: list[Claim] = []
  for part in filter(None, (p.strip().lower() for p in text.split("."))):
    match = SENTENCE.match(part)
    if match is None:
      claims.append((part, "unreadable"))
      continue
    color, events = match["color"], match["events"].split(", then ")
    aspects = ("size", "shape", "motion")
    claims += [(color, "exists"), *((color, each, match[each]) for each in aspects)]
    claims += [(color, "event", event) for event in events if event]
  return claims


def count_mistakes(
  text: str, scene: Scene, start: int = 0, stop: int = SCENE_FRAMES
) -> int:
  """Counts the wrong claims and the omitted claims of a description.

  Args:
    text: The description.
    scene: The scene.
    start: First frame of the described part of the clip.
    stop: Frame after the described part.
  """
  texts = (describe_scene(scene, start, stop), text)
  true, stated = (collections.Counter(split_claims(each)) for each in texts)
  return (stated - true).total() + (true - stated).total()


def is_correct(response: str, answer: str) -> bool:
  """Returns whether a response has the same words as the right answer."""
  split = lambda text: re.findall(r"\w+", text.lower())
  return split(response) == split(answer)
