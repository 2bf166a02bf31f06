"""What can be said of a scene: descriptions, questions, right and wrong answers."""

import re
from typing import NamedTuple

import numpy as np

from vlmrlaif_jax.data.world.scene import (
  COLORS,
  FRAMES,
  MOTIONS,
  RADIUS,
  SHAPES,
  SIZE,
  Scene,
  Shape,
  color_at,
  motion_at,
  position_at,
)

IMAGE = "Describe this image."
DESCRIBE = "Describe this video in detail."
HAPPENS = "What happens in the video?"
KINDS = (
  "attribute", "count", "motion", "event", "order", "presence", "false_premise"
)
NUMBERS = ("no", "one", "two", "three")

Claim = tuple[str, ...]  # (shape, "exists") or (shape, aspect, value).


class Question(NamedTuple):
  """A question with its right answer and plausible wrong ones."""

  kind: str  # Of KINDS.
  question: str
  answer: str
  wrong: tuple[str, ...]


def sentence(item: Shape, start: int = 0, stop: int = FRAMES) -> str:
  """What an object does in frames start..stop-1: "The small red ring moves left." """
  motion = motion_at(item, start)
  verb = "stays still" if motion == "still" else f"moves {motion}"
  head = f"The {item.size} {color_at(item, start)} {item.shape} {verb}"
  for event in item.events:
    if start < event.frame < stop:
      head += ", then stops" if event.kind == "stops" else f", then turns {event.color}"
  return head + "."


def describe(scene: Scene, start: int = 0, stop: int = FRAMES) -> str:
  """A sentence for each object, from left to right."""
  return " ".join(sentence(item, start, stop) for item in scene.objects)


def invent(scene: Scene, rng: np.random.Generator) -> str:
  """A sentence about an object that is not there."""
  shape, color, size, motion = (
    str(rng.choice(x))
    for x in (absent(scene), list(COLORS), list(RADIUS), list(MOTIONS))
  )
  return sentence(Shape(shape, color, size, motion, 0, 0))


def caption(scene: Scene, frame: int) -> str:
  """What one frame shows: "a small red ring and a large blue square"."""
  return " and ".join(f"a {i.size} {color_at(i, frame)} {i.shape}" for i in scene.objects)


def describe_image(scene: Scene, frame: int) -> str:
  """What one frame shows and where: "A small red ring at the top left." """
  thing = lambda i: f"A {i.size} {color_at(i, frame)} {i.shape} at the {_place(i, frame)}."
  items = sorted(scene.objects, key=lambda item: position_at(item, frame))
  return " ".join(thing(item) for item in items)


def _place(item: Shape, frame: int) -> str:
  """Where an object is, in ninths of the frame."""
  x, y = position_at(item, frame)
  third = lambda at: min(max(int(3 * at / SIZE), 0), 2)
  row, column = ("top", "middle", "bottom")[third(y)], ("left", "center", "right")[third(x)]
  return f"{row} {column}"


def image_questions(
  scene: Scene, frame: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
  """Questions about one frame, each with its right answer."""
  item = scene.objects[rng.integers(len(scene.objects))]
  missing = str(rng.choice(absent(scene)))
  color = f"The {item.shape} is {color_at(item, frame)}."
  place = f"The {item.shape} is at the {_place(item, frame)}."
  return [
    (f"Is there a {item.shape}?", f"Yes, there is a {item.shape}."),
    (f"Is there a {missing}?", f"No, there is no {missing}."),
    (f"What color is the {item.shape}?", color),
    (f"Where is the {item.shape}?", place),
  ]


def absent(scene: Scene) -> list[str]:
  """The shapes that the scene does not hold."""
  return [s for s in SHAPES if all(s != item.shape for item in scene.objects)]


# Questions ---------------------------------------------------------------------


def questions(scene: Scene, rng: np.random.Generator) -> dict[str, Question]:
  """One question of each kind that the scene allows; "order" needs two events."""
  item = scene.objects[rng.integers(len(scene.objects))]
  missing = str(rng.choice(absent(scene)))
  made = [
    _attribute(item, rng),
    _count(scene, rng),
    _motion(item, rng),
    _event(item, rng),
    _presence(item.shape, missing, rng),
    _false_premise(scene, missing, rng),
  ]
  order = _order(scene, rng)
  return {q.kind: q for q in [*made, *([order] if order else [])]}


def _attribute(item: Shape, rng) -> Question:
  if rng.random() < 0.7:
    ask, value, others = f"What color is the {item.shape} at first?", item.color, COLORS
  else:
    ask, value, others = f"How large is the {item.shape}?", item.size, RADIUS
  say = lambda v: f"The {item.shape} is {v}."
  wrong = [say(v) for v in others if v != value] + [f"There is no {item.shape}."]
  return Question("attribute", ask, say(value), tuple(wrong))


def _motion(item: Shape, rng) -> Question:
  say = lambda m: (
    f"The {item.shape} stays still." if m == "still" else f"The {item.shape} moves {m}."
  )
  wrong = [say(m) for m in MOTIONS if m != item.motion] + [f"There is no {item.shape}."]
  ask = f"Which way does the {item.shape} move at first?"
  return Question("motion", ask, say(item.motion), tuple(wrong))


def _count(scene: Scene, rng) -> Question:
  moving = sum(item.motion != "still" for item in scene.objects)
  if rng.random() < 0.5:
    number, ask = len(scene.objects), "How many objects are there?"
    say = lambda n: f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {_objects(n)}."
  else:
    number, ask = moving, "How many objects move?"
    say = lambda n: f"{NUMBERS[n].title()} {_objects(n)} {'moves' if n == 1 else 'move'}."
  wrong = tuple(say(n) for n in range(4) if n != number)
  return Question("count", ask, say(number), wrong)


def _objects(number: int) -> str:
  return "object" if number == 1 else "objects"


def _event(item: Shape, rng) -> Question:
  name, ask = item.shape, f"Does the {item.shape} turn another color?"
  turns = [e.color for e in item.events if e.kind == "turns"]
  yes = lambda color: f"Yes, the {name} turns {color}."
  no = lambda color: f"No, the {name} stays {color}."
  right = yes(turns[0]) if turns else no(item.color)
  candidates = [yes(c) for c in COLORS if c != item.color] + [no(c) for c in COLORS]
  wrong = tuple(c for c in candidates if c != right)
  return Question("event", ask, right, wrong)


def _order(scene: Scene, rng) -> Question | None:
  """Which of two events comes first; None where the scene has no such two."""
  events = [(e.frame, _happening(item, e)) for item in scene.objects
            for e in item.events]
  pairs = [(a, b) for a in events for b in events if a[0] < b[0]]
  if not pairs:
    return None
  (_, early), (_, late) = pairs[rng.integers(len(pairs))]
  shown = [early, late] if rng.random() < 0.5 else [late, early]
  say = lambda what: f"{what[0].upper()}{what[1:]} first."
  ask = f"What happens first, {shown[0]} or {shown[1]}?"
  return Question("order", ask, say(early), (say(late),))


def _happening(item: Shape, event) -> str:
  what = "stops" if event.kind == "stops" else f"turns {event.color}"
  return f"the {item.shape} {what}"


def _presence(shape: str, missing: str, rng) -> Question:
  there, name = (True, shape) if rng.random() < 0.5 else (False, missing)
  yes, no = f"Yes, there is a {name}.", f"No, there is no {name}."
  right, wrong = (yes, no) if there else (no, yes)
  return Question("presence", f"Is there a {name}?", right, (wrong,))


def _false_premise(scene: Scene, missing: str, rng) -> Question:
  """Asks of an object that is not there; wrong answers borrow from those that are."""
  other = lambda: scene.objects[rng.integers(len(scene.objects))]
  ask, said = [
    (f"What color is the {missing} at first?", f"is {other().color}"),
    (f"How large is the {missing}?", f"is {other().size}"),
    (f"Which way does the {missing} move at first?", _verb(other().motion)),
  ][rng.integers(3)]
  right = f"There is no {missing}."
  return Question("false_premise", ask, right, (f"The {missing} {said}.",))


def _verb(motion: str) -> str:
  return "stays still" if motion == "still" else f"moves {motion}"


# Wrong descriptions --------------------------------------------------------------


def corrupt(scene: Scene, rng: np.random.Generator, *, errors: int,
            start: int = 0, stop: int = FRAMES) -> str:
  """The description of a scene with that many mistakes in it.

  A mistake invents an object, leaves one out, or changes a color, size, motion or
  event of one.
  """
  items = list(scene.objects)
  said = [sentence(item, start, stop) for item in items]
  for _ in range(errors):
    kind = rng.choice(["invent", "omit", "change"], p=[0.3, 0.2, 0.5])
    if kind == "invent" or not said:
      said.insert(int(rng.integers(len(said) + 1)), invent(scene, rng))
    elif kind == "omit" and len(said) > 1:
      said.pop(int(rng.integers(len(said))))
    else:
      at = int(rng.integers(len(said)))
      said[at] = _change(said[at], rng)
  return " ".join(said)


def _change(text: str, rng) -> str:
  """One sentence with one word of it changed, or an event dropped or added."""
  words = {"color": list(COLORS), "size": list(RADIUS), "motion": list(MOTIONS)}
  kind = rng.choice(["color", "size", "motion", "event"], p=[0.35, 0.15, 0.3, 0.2])
  if kind == "event":
    if ", then" in text:
      return text[: text.rindex(", then")] + "."
    added = rng.choice(["stops", *(f"turns {c}" for c in COLORS)])
    return f"{text[:-1]}, then {added}."
  if kind == "motion":
    old = re.search(r"stays still|moves \w+", text)
    verbs = [_verb(m) for m in words["motion"]]
  else:
    old = re.search(r"\b(" + "|".join(words[kind]) + r")\b", text)
    verbs = words[kind]
  if old is None:
    return text
  new = str(rng.choice([v for v in verbs if v != old.group(0)]))
  return text[: old.start()] + new + text[old.end():]


# Instruction data as it is found in the wild ---------------------------------------


def careless_answer(question: Question, rng: np.random.Generator, *, rate: float) -> str:
  """The answer that instruction data written without looking would give.

  Args:
    rate: how often a false premise is gone along with. Other kinds are answered right.
  """
  if question.kind == "false_premise" and rng.random() < rate:
    return question.wrong[rng.integers(len(question.wrong))]
  return question.answer


def careless_description(scene: Scene, rng: np.random.Generator, *, rate: float) -> str:
  """A description that, at a rate, goes on to an object that is not there."""
  text = describe(scene)
  return f"{text} {invent(scene, rng)}" if rng.random() < rate else text


# Truth ------------------------------------------------------------------------------

SENTENCE = re.compile(
  rf"^the (?P<size>{'|'.join(RADIUS)}) (?P<color>{'|'.join(COLORS)}) "
  rf"(?P<shape>{'|'.join(SHAPES)}) "
  r"(?P<motion>stays still|moves (?:left|right|up|down))(?P<events>(?:, then [^,]+)*)$"
)


def claims(text: str) -> list[Claim]:
  """The single statements that a description makes; a sentence that is none of the
  known forms counts as one statement that nothing supports."""
  made: list[Claim] = []
  for part in filter(None, (p.strip().lower() for p in text.split("."))):
    match = SENTENCE.match(part)
    if match is None:
      made.append((part, "unreadable"))
      continue
    shape = match["shape"]
    made += [(shape, "exists"), (shape, "size", match["size"]),
             (shape, "color", match["color"]), (shape, "motion", match["motion"])]
    for event in filter(None, match["events"].split(", then ")):
      made.append((shape, "event", event))
  return made


def unsupported(text: str, scene: Scene) -> list[Claim]:
  """The statements of a description that the scene does not bear out."""
  true = set(claims(describe(scene)))
  return [claim for claim in claims(text) if claim not in true]


def mistakes(text: str, scene: Scene, start: int = 0, stop: int = FRAMES) -> int:
  """How many statements a description has too many or leaves out."""
  true, said = claims(describe(scene, start, stop)), claims(text)
  return len(set(said) ^ set(true)) + len(said) - len(set(said))


def is_right(response: str, answer: str) -> bool:
  """Whether a response says just what the right answer says."""
  plain = lambda s: re.findall(r"\w+", s.lower())  # Of any script; digits count.
  return plain(response) == plain(answer)
