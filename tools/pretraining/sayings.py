"""What pretraining alone says of a scene: of single frames, and with mistakes."""

import re

import numpy as np

from vlmrlaif_jax.data.world import language
from vlmrlaif_jax.data.world.scene import (
  COLORS,
  EVENTS,
  PALETTE,
  RADIUS,
  SCENE_FRAMES,
  SHAPES,
  SIZE,
  Scene,
  SceneObject,
  get_color_at,
  get_position_at,
  has_happened,
)

IMAGE = "Describe this image."
DESCRIBE = "Describe this video in detail."


# Single frames.


def visible(scene: Scene, frame: int) -> list[SceneObject]:
  """The objects of a frame, from left to right."""
  items = [i for i in scene.objects if not has_happened(i, "vanishes", frame)]
  return sorted(items, key=lambda item: get_position_at(item, frame))


def caption(scene: Scene, frame: int) -> str:
  """What one frame shows: "a small red ring and a large blue square"."""
  return " and ".join(
    f"a {i.size} {get_color_at(i, frame)} {i.shape}" for i in visible(scene, frame)
  )


def describe_image(scene: Scene, frame: int) -> str:
  """What one frame shows and where: A small red ring at the top left."""
  return " ".join(
    f"A {i.size} {get_color_at(i, frame)} {i.shape} at the {_place(i, frame)}."
    for i in visible(scene, frame)
  )


def _place(item: SceneObject, frame: int) -> str:
  """Where an object is, in ninths of the frame."""
  x, y = get_position_at(item, frame)
  third = lambda at: min(max(int(3 * at / SIZE), 0), 2)
  rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
  return f"{rows[third(y)]} {columns[third(x)]}"


def image_questions(
  scene: Scene, frame: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
  """Questions about one frame, which shows an object, each with its right answer."""
  shown = visible(scene, frame)
  item = shown[rng.integers(len(shown))]
  color = get_color_at(item, frame)
  colors = [get_color_at(each, frame) for each in shown]
  missing = str(rng.choice([c for c in COLORS if c not in colors]))
  asked = [
    (f"Is there a {color} object?", f"Yes, there is a {color} object."),
    (f"Is there a {missing} object?", f"No, there is no {missing} object."),
  ]
  if colors.count(color) > 1:  # Two that turned gray: "the gray object" is neither.
    return asked
  return [
    *asked,
    language.make_attribute_questions(color, "shape", item.shape),
    (
      f"Where is the {color} object?",
      f"The {color} object is at the {_place(item, frame)}.",
    ),
  ]


# Wrong descriptions.


def corrupt(
  scene: Scene,
  rng: np.random.Generator,
  *,
  errors: int,
  start: int = 0,
  stop: int = SCENE_FRAMES,
) -> str:
  """The description of a scene with that many mistakes in it.

  A mistake invents an object, leaves one out, or changes a color, shape, size, motion
  or event of one.
  """
  said = [language.describe_object(item, start, stop) for item in scene.objects]
  for _ in range(errors):
    kind = rng.choice(["invent", "omit", "change"], p=[0.3, 0.2, 0.5])
    if kind == "invent":
      said.insert(
        int(rng.integers(len(said) + 1)), language.invent_sentence(scene, rng)
      )
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
  "motion": language.MOVES,
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
