"""Texts about scenes for pretraining: single frames, and descriptions with mistakes."""

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


def list_visible_objects(scene: Scene, frame: int) -> list[SceneObject]:
  """Returns the objects of a frame, from left to right."""
  items = [i for i in scene.objects if not has_happened(i, "vanishes", frame)]
  return sorted(items, key=lambda item: get_position_at(item, frame))


def make_caption(scene: Scene, frame: int) -> str:
  """Returns a caption of a frame: "a small red ring and a large blue square"."""
  return " and ".join(
    f"a {i.size} {get_color_at(i, frame)} {i.shape}"
    for i in list_visible_objects(scene, frame)
  )


def describe_image(scene: Scene, frame: int) -> str:
  """Describes the objects and places of a frame: A small red ring at the top left."""
  return " ".join(
    f"A {i.size} {get_color_at(i, frame)} {i.shape} at the {_describe_place(i, frame)}."
    for i in list_visible_objects(scene, frame)
  )


def _describe_place(item: SceneObject, frame: int) -> str:
  """Returns the place of an object as one of nine parts of the frame."""
  x, y = get_position_at(item, frame)
  third = lambda at: min(max(int(3 * at / SIZE), 0), 2)
  rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
  return f"{rows[third(y)]} {columns[third(x)]}"


def make_image_questions(
  scene: Scene, frame: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
  """Returns questions about a frame with an object, each with its right answer."""
  items = list_visible_objects(scene, frame)
  item = items[rng.integers(len(items))]
  color = get_color_at(item, frame)
  colors = [get_color_at(each, frame) for each in items]
  missing = str(rng.choice([c for c in COLORS if c not in colors]))
  questions = [
    (f"Is there a {color} object?", f"Yes, there is a {color} object."),
    (f"Is there a {missing} object?", f"No, there is no {missing} object."),
  ]
  if colors.count(color) > 1:  # After two objects turn gray, the color is ambiguous.
    return questions
  return [
    *questions,
    language.make_attribute_questions(color, "shape", item.shape),
    (
      f"Where is the {color} object?",
      f"The {color} object is at the {_describe_place(item, frame)}.",
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
  """Describes a scene with mistakes.

  A mistake invents an object, omits one, or changes a color, shape, size, motion or
  event of one.

  Args:
    scene: The scene.
    rng: Random generator.
    errors: Number of mistakes.
    start: First frame of the description.
    stop: End of the frames.
  """
  sentences = [language.describe_object(item, start, stop) for item in scene.objects]
  for _ in range(errors):
    kind = rng.choice(["invent", "omit", "change"], p=[0.3, 0.2, 0.5])
    if kind == "invent":
      sentences.insert(
        int(rng.integers(len(sentences) + 1)), language.invent_sentence(scene, rng)
      )
    elif kind == "omit" and len(sentences) > 1:
      sentences.pop(int(rng.integers(len(sentences))))
    else:
      at = int(rng.integers(len(sentences)))
      sentences[at] = _change_aspect(sentences[at], rng)
  return " ".join(sentences)


CHANGES = {
  "color": tuple(COLORS),
  "shape": SHAPES,
  "size": tuple(RADIUS),
  "motion": language.MOVES,
}


def _change_aspect(text: str, rng) -> str:
  """Returns a sentence with a changed aspect, or with an event removed or added."""
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
