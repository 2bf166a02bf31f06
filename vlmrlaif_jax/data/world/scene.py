"""Scenes of moving shapes, their motion in time, and their rendering to mp4 files."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8

SCENE_FRAMES = 24  # Of each clip.
FPS = 8
SIZE = 64  # Pixels, both ways.
CLIP_FRAMES = (
  8  # Frames of a third of the clip; no event falls on a border between thirds.
)

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
  "red": (225, 45, 40),
  "green": (50, 190, 70),
  "blue": (60, 90, 235),
  "yellow": (240, 215, 50),
  "white": (240, 240, 240),
  "purple": (165, 70, 200),
}
RADIUS = {"small": 8.0, "large": 12.0}  # Pixels.
PALETTE = {**COLORS, "gray": (135, 135, 135)}  # No object starts gray; some turn so.
MOTIONS = {
  "left": (-1, 0),
  "right": (1, 0),
  "up": (0, -1),
  "down": (0, 1),
  "still": (0, 0),
}
SPEED = 1.35  # Pixels a frame.
# Other shades for the same words, for videos unlike those that were learned from.
SHADES = {
  "red": (165, 25, 60),
  "green": (25, 140, 105),
  "blue": (95, 150, 255),
  "yellow": (255, 175, 20),
  "white": (215, 205, 190),
  "purple": (115, 40, 150),
  "gray": (105, 112, 125),
}

EVENTS = ("stops", "turns gray", "vanishes")


class SceneEvent(NamedTuple):
  """Something that happens to an object."""

  frame: int  # The first frame that shows it.
  kind: str  # Of EVENTS.


class SceneObject(NamedTuple):
  """One object. `x`, `y` are its centre at frame 0, in pixels."""

  shape: str
  color: str  # At frame 0.
  size: str
  motion: str
  x: float
  y: float
  events: tuple[SceneEvent, ...] = ()  # In order of time.


class Scene(NamedTuple):
  """The hidden truth of a clip. No two objects start with the same color."""

  objects: tuple[SceneObject, ...]  # From left to right, as they stand at frame 0.
  background: int  # Grey level.
  bar: int  # Left edge in pixels of a grey bar that hides what is behind it; -1: none.
  seed: int  # Of the noise.


class RenderStyle(NamedTuple):
  """How scenes are shown; what is true of them does not depend on it."""

  palette: Mapping[str, tuple[int, int, int]] = PALETTE
  speed: float = SPEED  # Pixels in a FRAMES-th of the clip; above SPEED, things leave.
  frames: int = SCENE_FRAMES  # Of the clip, whose events lie at the same shares of it.


USUAL_STYLE = RenderStyle()
SHIFTED_STYLE = RenderStyle(SHADES, speed=0.9, frames=36)


def has_happened(item: SceneObject, kind: str, frame: float | int) -> bool:
  """Whether an event of that kind is over and done by a frame."""
  return any(e.kind == kind and e.frame <= frame for e in item.events)


def get_color_at(item: SceneObject, frame: float | int) -> str:
  """The color of an object at a frame: its own until it turns gray."""
  return "gray" if has_happened(item, "turns gray", frame) else item.color


def get_motion_at(item: SceneObject, frame: int) -> str:
  """The motion of an object at a frame: its own until it stops."""
  return "still" if has_happened(item, "stops", frame) else item.motion


def get_position_at(
  item: SceneObject, frame: float | int, speed: float = SPEED
) -> tuple[float, float]:
  """The centre of an object at a frame, in pixels."""
  stops = [e.frame for e in item.events if e.kind == "stops"]
  steps = min([frame, *stops]) * speed
  dx, dy = MOTIONS[item.motion]
  return item.x + dx * steps, item.y + dy * steps


def sample_scene(rng: np.random.Generator) -> Scene:
  """One to three objects with motions and events, all drawn from rng."""
  count = rng.choice([1, 2, 3], p=[0.2, 0.5, 0.3])
  items: list[SceneObject] = []
  for color in rng.choice(list(COLORS), size=count, replace=False):
    shape, size, motion = (str(rng.choice(list(x))) for x in (SHAPES, RADIUS, MOTIONS))
    x, y = _place(rng, items, motion, RADIUS[size])
    items.append(
      SceneObject(shape, str(color), size, motion, x, y, _events(rng, motion))
    )
  items.sort(key=lambda item: item.x)
  bar = int(rng.integers(8, SIZE - 14)) if rng.random() < 0.1 else -1
  return Scene(
    tuple(items), int(rng.integers(15, 60)), bar, int(rng.integers(2**31 - 1))
  )


def _place(rng, items, motion, radius) -> tuple[float, float]:
  """A start from which the whole path stays in view, away from other starts."""
  dx, dy = MOTIONS[motion]
  reach = SPEED * (SCENE_FRAMES - 1)
  for _ in range(20):
    x = rng.uniform(radius + max(-dx, 0) * reach, SIZE - radius - max(dx, 0) * reach)
    y = rng.uniform(radius + max(-dy, 0) * reach, SIZE - radius - max(dy, 0) * reach)
    if all(np.hypot(x - o.x, y - o.y) > radius + RADIUS[o.size] + 2 for o in items):
      break
  return round(float(x), 2), round(float(y), 2)


def _events(rng, motion) -> tuple[SceneEvent, ...]:
  """None, one or two events, each in a third of the clip of its own."""
  chances = {
    "stops": 0.3 if motion != "still" else 0.0,
    "turns gray": 0.3,
    "vanishes": 0.2,
  }
  kinds = [kind for kind, chance in chances.items() if rng.random() < chance]
  # What stops in the first third would hardly have moved, and what vanishes before
  # the last one could not be told of in it.
  thirds = {"stops": [1, 2], "turns gray": [0, 1, 2], "vanishes": [2]}
  events: list[SceneEvent] = []
  for kind in rng.permutation(kinds):
    free = [t for t in thirds[kind] if all(e.frame // CLIP_FRAMES != t for e in events)]
    if free and len(events) < 2:
      events.append(SceneEvent(CLIP_FRAMES * int(rng.choice(free)) + 3, str(kind)))
  return tuple(sorted(events))


def render_scene(
  scene: Scene, look: RenderStyle = USUAL_STYLE
) -> UInt8[np.ndarray, "frames height width 3"]:
  """The clip as pixels: drawn at twice the size, averaged down, with sensor noise."""
  scale = 2
  rng = np.random.default_rng(scene.seed)
  noise = 5 * rng.standard_normal((look.frames, SIZE, SIZE, 3), np.float32)
  wide = SIZE * scale
  canvas = np.full((look.frames, wide, wide, 3), scene.background, np.uint8)
  for item in scene.objects:
    radius = RADIUS[item.size]
    reach = 2 * int(radius + 2) * scale
    for t in range(look.frames):
      now = t * SCENE_FRAMES / look.frames
      if has_happened(item, "vanishes", now):
        break
      x, y = get_position_at(item, now, look.speed)
      # Only the square around the object is looked at.
      top, left = (max(int((c - radius - 1) * scale), 0) for c in (y, x))
      window = canvas[t, top : top + reach, left : left + reach]
      ys, xs = np.mgrid[: window.shape[0], : window.shape[1]]
      dy, dx = (ys + top) / scale - y, (xs + left) / scale - x
      window[_inside(item.shape, dx, dy, radius)] = look.palette[
        get_color_at(item, now)
      ]
  if scene.bar >= 0:
    canvas[:, :, scene.bar * scale : (scene.bar + 6) * scale] = 80
  corners = (canvas[:, i::scale, j::scale] for i in (0, 1) for j in (0, 1))
  frames = sum(c.astype(np.float32) for c in corners) / scale**2
  return np.clip(frames + noise, 0, 255).astype(np.uint8)


def _inside(shape: str, dx, dy, radius: float):
  """Which pixels, given by their offset from the centre, a shape covers."""
  distance = np.hypot(dx, dy)
  if shape == "circle":
    return distance <= radius
  if shape == "ring":
    return (distance <= radius) & (distance >= 0.55 * radius)
  if shape == "square":
    return np.maximum(np.abs(dx), np.abs(dy)) <= 0.86 * radius
  if shape == "cross":
    arm = 0.3 * radius
    reach = np.maximum(np.abs(dx), np.abs(dy)) <= radius
    return reach & ((np.abs(dx) <= arm) | (np.abs(dy) <= arm))
  if shape == "triangle":
    return (dy <= 0.8 * radius) & (dy >= 1.8 * np.abs(dx) - 1.0 * radius)
  raise ValueError(f"shape must be one of {SHAPES}, not {shape!r}")


def write_mp4(
  path: str | pathlib.Path, frames: UInt8[np.ndarray, "frames height width 3"]
) -> None:
  """Writes frames as an H.264 mp4 file at FPS frames a second."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=FPS)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": "16", "preset": "ultrafast"}
    stream.codec_context.thread_count = 1
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode())


def scene_to_json(scene: Scene) -> dict:
  """A scene as JSON values; `from_json` turns it back."""
  objects = [
    {**item._asdict(), "events": [list(e) for e in item.events]}
    for item in scene.objects
  ]
  return {**scene._asdict(), "objects": objects}


def scene_from_json(data: dict) -> Scene:
  """The scene that `to_json` wrote."""
  objects = tuple(
    SceneObject(**{**item, "events": tuple(SceneEvent(*e) for e in item["events"])})
    for item in data["objects"]
  )
  return Scene(**{**data, "objects": objects})
