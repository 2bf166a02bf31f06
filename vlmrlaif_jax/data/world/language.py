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
  FRAMES,
  MOTIONS,
  PALETTE,
  RADIUS,
  SHAPES,
  SIZE,
  Scene,
  Shape,
  color_at,
  happened,
  motion_at,
  position_at,
)

IMAGE = "Describe this image."
DESCRIBE = "Describe this video in detail."
HAPPENS = "What happens in the video?"
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


class Question(NamedTuple):
  """A question with its right answer and plausible wrong ones."""

  kind: str  # A key of builder.PROMPT_MIX.
  question: str
  answer: str
  wrong: tuple[str, ...]


# Descriptions.


def sentence(item: Shape, start: int = 0, stop: int = FRAMES) -> str:
  """What an object does in frames start..stop-1: The small red ring moves left."""
  head = f"The {item.size} {color_at(item, start)} {item.shape}"
  events = [f", then {e.kind}" for e in item.events if start < e.frame < stop]
  return f"{head} {_verb(motion_at(item, start))}{''.join(events)}."


def _verb(motion: str) -> str:
  return "stays still" if motion == "still" else f"moves {motion}"


def describe(scene: Scene, start: int = 0, stop: int = FRAMES) -> str:
  """A sentence for each object, from left to right."""
  return " ".join(sentence(item, start, stop) for item in scene.objects)


def invent(scene: Scene, rng: np.random.Generator) -> str:
  """A sentence about an object that is not there."""
  color, shape, size, motion = (
    str(rng.choice(x)) for x in (absent(scene), SHAPES, list(RADIUS), list(MOTIONS))
  )
  return sentence(Shape(shape, color, size, motion, 0, 0))


def absent(scene: Scene) -> list[str]:
  """The colors that no object of the scene starts with."""
  return [c for c in COLORS if all(c != item.color for item in scene.objects)]


# Single frames.


def visible(scene: Scene, frame: int) -> list[Shape]:
  """The objects of a frame, from left to right."""
  items = [i for i in scene.objects if not happened(i, "vanishes", frame)]
  return sorted(items, key=lambda item: position_at(item, frame))


def caption(scene: Scene, frame: int) -> str:
  """What one frame shows: "a small red ring and a large blue square"."""
  return " and ".join(
    f"a {i.size} {color_at(i, frame)} {i.shape}" for i in visible(scene, frame)
  )


def describe_image(scene: Scene, frame: int) -> str:
  """What one frame shows and where: A small red ring at the top left."""
  return " ".join(
    f"A {i.size} {color_at(i, frame)} {i.shape} at the {_place(i, frame)}."
    for i in visible(scene, frame)
  )


def _place(item: Shape, frame: int) -> str:
  """Where an object is, in ninths of the frame."""
  x, y = position_at(item, frame)
  third = lambda at: min(max(int(3 * at / SIZE), 0), 2)
  rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
  return f"{rows[third(y)]} {columns[third(x)]}"


def image_questions(
  scene: Scene, frame: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
  """Questions about one frame, which shows an object, each with its right answer."""
  shown = visible(scene, frame)
  item = shown[rng.integers(len(shown))]
  color = color_at(item, frame)
  colors = [color_at(each, frame) for each in shown]
  missing = str(rng.choice([c for c in COLORS if c not in colors]))
  asked = [
    (f"Is there a {color} object?", f"Yes, there is a {color} object."),
    (f"Is there a {missing} object?", f"No, there is no {missing} object."),
  ]
  if colors.count(color) > 1:  # Two that turned gray: "the gray object" is neither.
    return asked
  return [
    *asked,
    (f"What shape is the {color} object?", f"The {color} object is a {item.shape}."),
    (
      f"Where is the {color} object?",
      f"The {color} object is at the {_place(item, frame)}.",
    ),
  ]


# Questions.


def questions(scene: Scene, rng: np.random.Generator) -> dict[str, Question]:
  """One question of each kind that the scene allows; "order" needs two events."""
  item = scene.objects[rng.integers(len(scene.objects))]
  missing = str(rng.choice(absent(scene)))
  made = [
    _attribute(item, rng),
    _count(scene, rng),
    _motion(item),
    _event(item),
    _presence(item.color, missing, rng),
    _false_premise(scene, missing, rng),
  ]
  order = _order(scene, rng)
  return {q.kind: q for q in [*made, *([order] if order else [])]}


def _no(color: str) -> str:
  return f"There is no {color} object."


def _attribute(item: Shape, rng) -> Question:
  name = f"{item.color} object"
  values: tuple[str, ...]
  if rng.random() < 0.6:
    ask, value, values = f"What shape is the {name}?", item.shape, SHAPES
    say = lambda v: f"The {name} is a {v}."
  else:
    ask, value, values = f"How large is the {name}?", item.size, tuple(RADIUS)
    say = lambda v: f"The {name} is {v}."
  wrong = [*(say(v) for v in values if v != value), _no(item.color)]
  return Question("attribute", ask, say(value), tuple(wrong))


def _motion(item: Shape) -> Question:
  name = f"{item.color} object"
  say = lambda motion: f"The {name} {_verb(motion)}."
  wrong = [*(say(m) for m in MOTIONS if m != item.motion), _no(item.color)]
  ask = f"Which way does the {name} move at first?"
  return Question("motion", ask, say(item.motion), tuple(wrong))


def _count(scene: Scene, rng) -> Question:
  if rng.random() < 0.5:
    number, ask = len(scene.objects), "How many objects are there?"
    say = lambda n: f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {_objects(n)}."
  else:
    number = sum(item.motion != "still" for item in scene.objects)
    ask = "How many objects move?"
    verb = lambda n: "moves" if n == 1 else "move"
    say = lambda n: f"{NUMBERS[n].title()} {_objects(n)} {verb(n)}."
  wrong = tuple(say(n) for n in range(4) if n != number)
  return Question("count", ask, say(number), wrong)


def _objects(number: int) -> str:
  return "object" if number == 1 else "objects"


def _event(item: Shape) -> Question:
  name = f"{item.color} object"

  def say(kinds):
    if not kinds:
      return f"Nothing happens to the {name}."
    return f"The {name} {', then '.join(kinds)}."

  right = say([e.kind for e in item.events])
  others = [say([]), *(say([kind]) for kind in EVENTS)]
  wrong = tuple(said for said in others if said != right)
  return Question("event", f"What happens to the {name}?", right, wrong)


def _order(scene: Scene, rng) -> Question | None:
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
  return Question("order", ask, say(early), (say(late),))


def _presence(color: str, missing: str, rng) -> Question:
  there, name = (True, color) if rng.random() < 0.5 else (False, missing)
  yes, no = f"Yes, there is a {name} object.", f"No, there is no {name} object."
  right, wrong = (yes, no) if there else (no, yes)
  return Question("presence", f"Is there a {name} object?", right, (wrong,))


def _false_premise(scene: Scene, missing: str, rng) -> Question:
  """Asks of an object that is not there; wrong answers borrow from those that are."""
  other = scene.objects[rng.integers(len(scene.objects))]
  name = f"{missing} object"
  ask, said = [
    (f"What shape is the {name}?", f"is a {other.shape}"),
    (f"How large is the {name}?", f"is {other.size}"),
    (f"Which way does the {name} move at first?", _verb(other.motion)),
  ][rng.integers(3)]
  return Question("false_premise", ask, _no(missing), (f"The {name} {said}.",))


# Wrong descriptions.


def corrupt(
  scene: Scene,
  rng: np.random.Generator,
  *,
  errors: int,
  start: int = 0,
  stop: int = FRAMES,
) -> str:
  """The description of a scene with that many mistakes in it.

  A mistake invents an object, leaves one out, or changes a color, shape, size, motion
  or event of one.
  """
  said = [sentence(item, start, stop) for item in scene.objects]
  for _ in range(errors):
    kind = rng.choice(["invent", "omit", "change"], p=[0.3, 0.2, 0.5])
    if kind == "invent":
      said.insert(int(rng.integers(len(said) + 1)), invent(scene, rng))
    elif kind == "omit" and len(said) > 1:
      said.pop(int(rng.integers(len(said))))
    else:
      at = int(rng.integers(len(said)))
      said[at] = _change(said[at], rng)
  return " ".join(said)


CHANGES = {
  "color": tuple(COLORS),
  "shape": SHAPES,
  "size": tuple(RADIUS),
  "motion": tuple(_verb(motion) for motion in MOTIONS),
}


def _change(text: str, rng) -> str:
  """One sentence with one aspect of it changed, or an event dropped or added."""
  kind = rng.choice([*CHANGES, "event"])
  if kind == "event":
    if ", then" in text:
      return text[: text.rindex(", then")] + "."
    return f"{text[:-1]}, then {rng.choice(EVENTS)}."
  values = CHANGES[kind]
  old = re.search("|".join(PALETTE if kind == "color" else values), text)
  if old is None:
    raise ValueError(f"no {kind} to change in {text!r}")
  new = str(rng.choice([v for v in values if v != old.group(0)]))
  return text[: old.start()] + new + text[old.end() :]


# Instruction data as it is found in the wild.


def careless_answer(
  question: Question, rng: np.random.Generator, *, denial: float = 0.0
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


def careless_description(
  scene: Scene, rng: np.random.Generator, *, rate: float, omission: float = 0.0
) -> str:
  """A description that was written without looking.

  Args:
    rate: how often it goes on to an object that is not there.
    omission: how often it leaves out the last of several objects.
  """
  said = [sentence(item) for item in scene.objects]
  if omission and len(said) > 1 and rng.random() < omission:
    said.pop()
  if rng.random() < rate:
    said.append(invent(scene, rng))
  return " ".join(said)


# Truth.

SENTENCE = re.compile(
  rf"^the (?P<size>{'|'.join(RADIUS)}) (?P<color>{'|'.join(PALETTE)}) "
  rf"(?P<shape>{'|'.join(SHAPES)}) "
  r"(?P<motion>stays still|moves (?:left|right|up|down))(?P<events>(?:, then [^,]+)*)$"
)


def claims(text: str) -> list[Claim]:
  """The single statements that a description makes; a sentence that is none of the
  known forms counts as one statement that nothing supports.
  """
  made: list[Claim] = []
  for part in filter(None, (p.strip().lower() for p in text.split("."))):
    match = SENTENCE.match(part)
    if match is None:
      made.append((part, "unreadable"))
      continue
    color = match["color"]
    made += [
      (color, "exists"),
      (color, "size", match["size"]),
      (color, "shape", match["shape"]),
      (color, "motion", match["motion"]),
    ]
    for event in filter(None, match["events"].split(", then ")):
      made.append((color, "event", event))
  return made


def mistakes(text: str, scene: Scene, start: int = 0, stop: int = FRAMES) -> int:
  """How many statements a description has too many or leaves out."""
  texts = (describe(scene, start, stop), text)
  true, said = (collections.Counter(claims(each)) for each in texts)
  return (said - true).total() + (true - said).total()


def is_right(response: str, answer: str) -> bool:
  """Whether a response says just what the right answer says."""
  plain = lambda s: re.findall(r"\w+", s.lower())  # Of any script; digits count.
  return plain(response) == plain(answer)
