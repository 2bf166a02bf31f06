"""What can be said of a scene: descriptions, questions, right and wrong answers.

Objects go by the color they start with: "the red object".
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

# Instruction data in the wild goes along with a false premise and describes what is
# not there; so does this, at these rates, and a policy trained on it has that to lose.
CARELESS_PREMISE = 0.7
CARELESS_DESCRIPTION = 0.65
# It also overlooks what is there. Without these, the judge would never be shown a false
# denial, and a reward model would take every denial for a good answer.
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
  """What an object does in frames start..stop-1: The small red ring moves left."""
  head = f"The {item.size} {get_color_at(item, start)} {item.shape}"
  events = [f", then {e.kind}" for e in item.events if start < e.frame < stop]
  return f"{head} {_verb(get_motion_at(item, start))}{''.join(events)}."


def _verb(motion: str) -> str:
  return "stays still" if motion == "still" else f"moves {motion}"


MOVES = tuple(_verb(motion) for motion in MOTIONS)


def describe_scene(scene: Scene, start: int = 0, stop: int = SCENE_FRAMES) -> str:
  """A sentence for each object, from left to right."""
  return " ".join(describe_object(item, start, stop) for item in scene.objects)


def invent_sentence(scene: Scene, rng: np.random.Generator) -> str:
  """A sentence about an object that is not there."""
  color, shape, size, motion = (
    str(rng.choice(x))
    for x in (find_absent_colors(scene), SHAPES, list(RADIUS), list(MOTIONS))
  )
  return describe_object(SceneObject(shape, color, size, motion, 0, 0))


def find_absent_colors(scene: Scene) -> list[str]:
  """The colors that no object of the scene starts with."""
  return [c for c in COLORS if all(c != item.color for item in scene.objects)]


# Questions.

# By aspect: what asks for it of an object, which goes by its color, and what tells it.
ATTRIBUTE_QUESTIONS = {
  "shape": ("What shape is the {} object?", "The {} object is a {}."),
  "size": ("How large is the {} object?", "The {} object is {}."),
  "motion": ("Which way does the {} object move at first?", "The {} object {}."),
  "events": ("What happens to the {} object?", "The {} object {}."),
}


def make_attribute_questions(color: str, aspect: str, value: str) -> tuple[str, str]:
  """The question for an aspect of an object, and the answer that it is `value`."""
  asked, told = ATTRIBUTE_QUESTIONS[aspect]
  return asked.format(color), told.format(color, value)


def make_questions(scene: Scene, rng: np.random.Generator) -> dict[str, WorldQuestion]:
  """One question of each kind that the scene allows; "order" needs two events."""
  item = scene.objects[rng.integers(len(scene.objects))]
  missing = str(rng.choice(find_absent_colors(scene)))
  made = [
    _attribute(item, rng),
    _count(scene, rng),
    _one_of("motion", item, "motion", _verb(item.motion), MOVES),
    _event(item),
    _presence(item.color, missing, rng),
    _false_premise(scene, missing, rng),
  ]
  order = _order(scene, rng)
  return {q.kind: q for q in [*made, *([order] if order else [])]}


def _no(color: str) -> str:
  return f"There is no {color} object."


def _attribute(item: SceneObject, rng) -> WorldQuestion:
  if rng.random() < 0.6:
    return _one_of("attribute", item, "shape", item.shape, SHAPES)
  return _one_of("attribute", item, "size", item.size, tuple(RADIUS))


def _one_of(
  kind: str, item: SceneObject, aspect: str, right: str, values: tuple[str, ...]
) -> WorldQuestion:
  """Asks for an aspect that has one of some values; the last wrong answer denies the
  object.
  """
  ask, answer = make_attribute_questions(item.color, aspect, right)
  wrong = (
    make_attribute_questions(item.color, aspect, value)[1]
    for value in values
    if value != right
  )
  return WorldQuestion(kind, ask, answer, (*wrong, _no(item.color)))


def _count(scene: Scene, rng) -> WorldQuestion:
  if rng.random() < 0.5:
    number, ask = len(scene.objects), "How many objects are there?"
    say = lambda n: f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {_objects(n)}."
  else:
    number = sum(item.motion != "still" for item in scene.objects)
    ask = "How many objects move?"
    verb = lambda n: "moves" if n == 1 else "move"
    say = lambda n: f"{NUMBERS[n].title()} {_objects(n)} {verb(n)}."
  wrong = tuple(say(n) for n in range(4) if n != number)
  return WorldQuestion("count", ask, say(number), wrong)


def _objects(number: int) -> str:
  return "object" if number == 1 else "objects"


def _event(item: SceneObject) -> WorldQuestion:
  def say(*kinds):
    if not kinds:
      return f"Nothing happens to the {item.color} object."
    return make_attribute_questions(item.color, "events", ", then ".join(kinds))[1]

  right = say(*(e.kind for e in item.events))
  others = [say(), *map(say, EVENTS)]
  wrong = tuple(said for said in others if said != right)
  return WorldQuestion(
    "event", ATTRIBUTE_QUESTIONS["events"][0].format(item.color), right, wrong
  )


def _order(scene: Scene, rng) -> WorldQuestion | None:
  """Which of two events comes first; None where the scene has no such two."""
  events = [
    (e.frame, f"the {item.color} object {e.kind}")
    for item in scene.objects
    for e in item.events
  ]
  pairs = [(a, b) for a in events for b in events if a[0] < b[0]]
  if not pairs:
    return None
  (_, early), (_, late) = pairs[rng.integers(len(pairs))]
  shown = [early, late] if rng.random() < 0.5 else [late, early]
  say = lambda what: f"{what[0].upper()}{what[1:]} first."
  ask = f"What happens first, {shown[0]} or {shown[1]}?"
  return WorldQuestion("order", ask, say(early), (say(late),))


def _presence(color: str, missing: str, rng) -> WorldQuestion:
  there, name = (True, color) if rng.random() < 0.5 else (False, missing)
  yes, no = f"Yes, there is a {name} object.", f"No, there is no {name} object."
  right, wrong = (yes, no) if there else (no, yes)
  return WorldQuestion("presence", f"Is there a {name} object?", right, (wrong,))


def _false_premise(scene: Scene, missing: str, rng) -> WorldQuestion:
  """Asks of an object that is not there; wrong answers borrow from those that are."""
  other = scene.objects[rng.integers(len(scene.objects))]
  aspects = (
    ("shape", other.shape),
    ("size", other.size),
    ("motion", _verb(other.motion)),
  )
  ask, wrong = make_attribute_questions(missing, *aspects[rng.integers(3)])
  return WorldQuestion("false_premise", ask, _no(missing), (wrong,))


# Instruction data as it is found in the wild.


def make_careless_answer(
  question: WorldQuestion, rng: np.random.Generator, *, denial: float = CARELESS_DENIAL
) -> str:
  """The answer that instruction data written without looking would give.

  Args:
    denial: how often an object that is asked for is said not to be there.
  """
  if question.kind == "false_premise" and rng.random() < CARELESS_PREMISE:
    return question.wrong[0]
  # The last of the wrong answers denies the object.
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
  """A description that was written without looking.

  Args:
    rate: how often it goes on to an object that is not there.
    omission: how often it leaves out the last of several objects.
  """
  said = [describe_object(item) for item in scene.objects]
  if omission and len(said) > 1 and rng.random() < omission:
    said.pop()
  if rng.random() < rate:
    said.append(invent_sentence(scene, rng))
  return " ".join(said)


# Truth.

SENTENCE = re.compile(
  rf"^the (?P<size>{'|'.join(RADIUS)}) (?P<color>{'|'.join(PALETTE)}) "
  rf"(?P<shape>{'|'.join(SHAPES)}) "
  r"(?P<motion>stays still|moves (?:left|right|up|down))(?P<events>(?:, then [^,]+)*)$"
)


def split_claims(text: str) -> list[Claim]:
  """The single statements that a description makes; a sentence that is none of the
  known forms counts as one statement that nothing supports.
  """
  made: list[Claim] = []
  for part in filter(None, (p.strip().lower() for p in text.split("."))):
    match = SENTENCE.match(part)
    if match is None:
      made.append((part, "unreadable"))
      continue
    color, events = match["color"], match["events"].split(", then ")
    aspects = ("size", "shape", "motion")
    made += [(color, "exists"), *((color, each, match[each]) for each in aspects)]
    made += [(color, "event", event) for event in events if event]
  return made


def count_mistakes(
  text: str, scene: Scene, start: int = 0, stop: int = SCENE_FRAMES
) -> int:
  """How many statements a description has too many or leaves out."""
  texts = (describe_scene(scene, start, stop), text)
  true, said = (collections.Counter(split_claims(each)) for each in texts)
  return (said - true).total() + (true - said).total()


def is_correct(response: str, answer: str) -> bool:
  """Whether a response says just what the right answer says."""
  plain = lambda s: re.findall(r"\w+", s.lower())  # Of any script; digits count.
  return plain(response) == plain(answer)
