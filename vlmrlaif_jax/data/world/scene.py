"""Scenes of moving shapes, their motion in time, and their rendering to mp4 files."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8

SCENE_FRAMES = 24  # Frames per clip.
FPS = 8
SIZE = 64  # Height and width in pixels.
# Frames in a third of the clip. No event is at the border of two thirds.
CLIP_FRAMES = 8

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
PALETTE = {**COLORS, "gray": (135, 135, 135)}  # Gray is never an initial color.
MOTIONS = {
  "left": (-1, 0),
  "right": (1, 0),
  "up": (0, -1),
  "down": (0, 1),
  "still": (0, 0),
}
SPEED = 1.35  # Pixels per frame.
# Other shades of the same color words, for videos that look different.
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
  """An event of an object."""

  frame: int  # First frame after the event.
  kind: str  # One of EVENTS.


class SceneObject(NamedTuple):
  """An object of a scene."""

  shape: str  # One of SHAPES.
  color: str  # Initial color, a key of COLORS.
  size: str  # A key of RADIUS.
  motion: str  # A key of MOTIONS.
  x: float  # Horizontal center at frame 0, in pixels.
  y: float  # Vertical center at frame 0, in pixels.
  events: tuple[SceneEvent, ...] = ()  # Events in order of time.


class Scene(NamedTuple):
  """The ground truth of a clip. The initial colors of objects differ."""

  objects: tuple[SceneObject, ...]  # Ordered from left to right at frame 0.
  background: int  # Gray level from 0 to 255.
  bar: int  # Left edge in pixels of a gray bar in the foreground; -1 for no bar.
  seed: int  # Seed of the noise.


class RenderStyle(NamedTuple):
  """The visual style of clips, which does not affect their ground truth."""

  palette: Mapping[str, tuple[int, int, int]] = PALETTE
  # Pixels per 1/SCENE_FRAMES of the clip. Objects leave the view above SPEED.
  speed: float = SPEED
  # Frames of the clip. The relative times of events do not change.
  frames: int = SCENE_FRAMES


USUAL_STYLE = RenderStyle()
SHIFTED_STYLE = RenderStyle(SHADES, speed=0.9, frames=36)


def has_happened(item: SceneObject, kind: str, frame: float | int) -> bool:
  """Returns whether an object has an event of a kind at or before a frame."""
  return any(e.kind == kind and e.frame <= frame for e in item.events)


def get_color_at(item: SceneObject, frame: float | int) -> str:
  """Returns the color of an object at a frame."""
  return "gray" if has_happened(item, "turns gray", frame) else item.color


def get_motion_at(item: SceneObject, frame: int) -> str:
  """Returns the motion of an object at a frame."""
  return "still" if has_happened(item, "stops", frame) else item.motion


def get_position_at(
  item: SceneObject, frame: float | int, speed: float = SPEED
) -> tuple[float, float]:
  """Returns the center (x, y) of an object at a frame, in pixels."""
  stops = [e.frame for e in item.events if e.kind == "stops"]
  steps = min([frame, *stops]) * speed
  dx, dy = MOTIONS[item.motion]
  return item.x + dx * steps, item.y + dy * steps


def sample_scene(rng: np.random.Generator) -> Scene:
  """Samples a scene of one to three objects with motions and events."""
  count = rng.choice([1, 2, 3], p=[0.2, 0.5, 0.3])
  items: list[SceneObject] = []
  for color in rng.choice(list(COLORS), size=count, replace=False):
    shape, size, motion = (str(rng.choice(list(x))) for x in (SHAPES, RADIUS, MOTIONS))
    x, y = _sample_position(rng, items, motion, RADIUS[size])
    events = _sample_events(rng, motion)
    items.append(SceneObject(shape, str(color), size, motion, x, y, events))
  items.sort(key=lambda item: item.x)
  bar = int(rng.integers(8, SIZE - 14)) if rng.random() < 0.1 else -1
  return Scene(
    tuple(items), int(rng.integers(15, 60)), bar, int(rng.integers(2**31 - 1))
  )


def _sample_position(rng, items, motion, radius) -> tuple[float, float]:
  """Samples a start from which the path stays in view, away from other starts."""
  dx, dy = MOTIONS[motion]
  reach = SPEED * (SCENE_FRAMES - 1)
  for _ in range(20):
    x = rng.uniform(radius + max(-dx, 0) * reach, SIZE - radius - max(dx, 0) * reach)
    y = rng.uniform(radius + max(-dy, 0) * reach, SIZE - radius - max(dy, 0) * reach)
    if all(np.hypot(x - o.x, y - o.y) > radius + RADIUS[o.size] + 2 for o in items):
      break
  return round(float(x), 2), round(float(y), 2)


def _sample_events(rng, motion) -> tuple[SceneEvent, ...]:
  """Samples up to two events in different thirds of the clip."""
  probabilities = {
    "stops": 0.3 if motion != "still" else 0.0,
    "turns gray": 0.3,
    "vanishes": 0.2,
  }
  kinds = [kind for kind, p in probabilities.items() if rng.random() < p]
  # An object that stops in the first third has hardly moved. An object that vanishes
  # before the last third cannot be described in that third.
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
  """Renders a clip at twice its size, averages it down and adds noise."""
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
      # Only the square around the object is tested.
      top, left = (max(int((c - radius - 1) * scale), 0) for c in (y, x))
      window = canvas[t, top : top + reach, left : left + reach]
      ys, xs = np.mgrid[: window.shape[0], : window.shape[1]]
      dy, dx = (ys + top) / scale - y, (xs + left) / scale - x
      covered = _is_inside(item.shape, dx, dy, radius)
      window[covered] = look.palette[get_color_at(item, now)]
  if scene.bar >= 0:
    canvas[:, :, scene.bar * scale : (scene.bar + 6) * scale] = 80
  corners = (canvas[:, i::scale, j::scale] for i in (0, 1) for j in (0, 1))
  frames = sum(c.astype(np.float32) for c in corners) / scale**2
  return np.clip(frames + noise, 0, 255).astype(np.uint8)


def _is_inside(shape: str, dx, dy, radius: float):
  """Returns a mask of the pixels in a shape, from their offsets to its center."""
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
  """Writes frames as an H.264 mp4 file with FPS frames per second."""
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
  """Converts a scene to JSON values."""
  objects = [
    {**item._asdict(), "events": [list(e) for e in item.events]}
    for item in scene.objects
  ]
  return {**scene._asdict(), "objects": objects}


def scene_from_json(data: dict) -> Scene:
  """Converts JSON values by `scene_to_json` back to a scene."""
  objects = tuple(
    SceneObject(**{**item, "events": tuple(SceneEvent(*e) for e in item["events"])})
    for item in data["objects"]
  )
  return Scene(**{**data, "objects": objects})
