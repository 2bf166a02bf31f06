"""Scenes: what is drawn at random keeps to its rules, and the pixels show it."""

import json

import av
import numpy as np
import pytest

from vlmrlaif_jax.data.world import scene
from vlmrlaif_jax.data.world.scene import COLORS, Scene, SceneEvent, SceneObject

rng = np.random.default_rng(0)
SCENES = [scene.sample_scene(rng) for _ in range(300)]
EVENTS = [(item, item.events) for each in SCENES for item in each.objects]


def test_json_round_trip():
  for each in SCENES:
    assert (
      scene.scene_from_json(json.loads(json.dumps(scene.scene_to_json(each)))) == each
    )


def test_objects_differ_in_color_and_stand_from_left_to_right():
  for each in SCENES:
    assert len({item.color for item in each.objects}) == len(each.objects)
    assert list(each.objects) == sorted(each.objects, key=lambda item: item.x)
  assert {len(each.objects) for each in SCENES} == {1, 2, 3}


def test_positions_stay_in_view():
  for item, _ in EVENTS:
    radius = scene.RADIUS[item.size]
    path = [scene.get_position_at(item, t) for t in range(scene.SCENE_FRAMES)]
    # A start is rounded to hundredths of a pixel.
    assert min(map(min, path)) >= radius - 0.01
    assert max(map(max, path)) <= scene.SIZE - radius + 0.01


def test_events_lie_inside_different_thirds():
  """Whoever sees one third alone can tell that an event is in it."""
  for _, events in EVENTS:
    frames = [event.frame for event in events]
    thirds = [frame // scene.CLIP_FRAMES for frame in frames]
    assert thirds == sorted(set(thirds))
    assert all(
      2 <= frame % scene.CLIP_FRAMES <= scene.CLIP_FRAMES - 2 for frame in frames
    )


def test_what_stops_has_moved_for_a_third():
  stops = [(item, e) for item, events in EVENTS for e in events if e.kind == "stops"]
  assert len(stops) > 30
  for item, event in stops:
    assert item.motion != "still" and event.frame >= scene.CLIP_FRAMES


def test_what_vanishes_is_seen_into_the_last_third():
  gone = [e for _, events in EVENTS for e in events if e.kind == "vanishes"]
  assert len(gone) > 30
  assert all(event.frame > 2 * scene.CLIP_FRAMES for event in gone)


def test_no_object_starts_gray():
  assert all(item.color in COLORS and item.color != "gray" for item, _ in EVENTS)


MOVER = SceneObject(
  "circle", "red", "small", "right", 10, 30,
  (SceneEvent(11, "turns gray"), SceneEvent(19, "stops")),
)  # fmt: skip


@pytest.mark.parametrize(
  "frame, color, motion, x",
  [
    (0, "red", "right", 10.0),
    (10, "red", "right", 23.5),
    (11, "gray", "right", 24.85),
    (18, "gray", "right", 34.3),
    (19, "gray", "still", 35.65),
    (23, "gray", "still", 35.65),
  ],
)
def test_state_of_an_object_at_a_frame(frame, color, motion, x):
  assert scene.get_color_at(MOVER, frame) == color
  assert scene.get_motion_at(MOVER, frame) == motion
  assert scene.get_position_at(MOVER, frame) == pytest.approx((x, 30.0))


@pytest.mark.parametrize("frame", [0, 10, 11, 19, 23])
def test_pixels_show_the_object_where_and_as_it_is(frame):
  pixels = scene.render_scene(Scene((MOVER,), background=30, bar=-1, seed=1))[frame]
  ys, xs = np.nonzero(np.abs(pixels.astype(int) - 30).max(-1) > 60)
  # A pixel is the mean of what is at its index and half a pixel further on.
  center = [c - 0.25 for c in scene.get_position_at(MOVER, frame)]
  assert (xs.mean(), ys.mean()) == pytest.approx(center, abs=0.3)
  assert xs.max() - xs.min() == pytest.approx(2 * scene.RADIUS["small"], abs=1.5)
  inside = pixels[int(ys.mean()), int(xs.mean())].astype(int)
  assert np.abs(inside - scene.PALETTE[scene.get_color_at(MOVER, frame)]).max() < 25


def test_another_look_changes_pixels_and_not_what_happens_when():
  look = scene.SHIFTED_STYLE
  pixels = scene.render_scene(Scene((MOVER,), background=30, bar=-1, seed=1), look)
  assert len(pixels) == look.frames > scene.SCENE_FRAMES
  for frame in (0, look.frames // 2, look.frames - 1):
    now = frame * scene.SCENE_FRAMES / look.frames
    ys, xs = np.nonzero(np.abs(pixels[frame].astype(int) - 30).max(-1) > 45)
    center = [c - 0.25 for c in scene.get_position_at(MOVER, now, look.speed)]
    assert (xs.mean(), ys.mean()) == pytest.approx(center, abs=0.3)
    inside = pixels[frame, int(ys.mean()), int(xs.mean())].astype(int)
    assert np.abs(inside - look.palette[scene.get_color_at(MOVER, now)]).max() < 25


def test_another_look_has_a_shade_for_every_color_and_keeps_things_in_view():
  assert set(scene.SHADES) == set(scene.PALETTE)
  assert all(scene.SHADES[name] != scene.PALETTE[name] for name in scene.PALETTE)
  assert scene.SHIFTED_STYLE.speed < scene.SPEED


@pytest.mark.parametrize("shape", scene.SHAPES)
def test_every_shape_is_drawn_in_its_own_way(shape):
  draw = lambda name: scene.render_scene(
    Scene((SceneObject(name, "white", "large", "still", 32, 32),), 20, -1, seed=1)
  )[0]
  areas = {name: (draw(name).mean(-1) > 128) for name in scene.SHAPES}
  assert 80 < areas[shape].sum() < 3.2 * scene.RADIUS["large"] ** 2
  for other in set(scene.SHAPES) - {shape}:
    assert (areas[shape] ^ areas[other]).sum() > 40


def test_what_has_vanished_is_not_drawn():
  still = SceneObject(
    "circle", "white", "large", "still", 32, 32, (SceneEvent(19, "vanishes"),)
  )
  pixels = scene.render_scene(Scene((still,), background=20, bar=-1, seed=1)).astype(
    int
  )
  assert pixels[18, 32, 32].min() > 200 and np.abs(pixels[19:] - 20).max() < 40


def test_bar_hides_what_is_behind_it():
  still = SceneObject("circle", "white", "large", "still", 32, 32)
  pixels = scene.render_scene(Scene((still,), background=20, bar=30, seed=1))
  assert np.abs(pixels[:, 32, 30:36].astype(int) - 80).max() < 35
  assert pixels[:, 32, 26].min() > 200


def test_unknown_shape_is_an_error():
  wrong = SceneObject("star", "red", "small", "still", 30, 30)
  with pytest.raises(ValueError, match="not 'star'"):
    scene.render_scene(Scene((wrong,), 20, -1, 0))


def test_same_seed_makes_the_same_scene():
  sample = lambda seed: scene.sample_scene(np.random.default_rng(seed))
  assert sample(1) == sample(1) != sample(2)


def test_same_scene_makes_the_same_bytes(tmp_path):
  for name in ("a.mp4", "b.mp4"):
    scene.write_mp4(tmp_path / name, scene.render_scene(SCENES[0]))
  assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_mp4_holds_the_frames(tmp_path):
  frames = scene.render_scene(SCENES[0])
  scene.write_mp4(tmp_path / "a.mp4", frames)
  with av.open(str(tmp_path / "a.mp4")) as container:
    stream = container.streams.video[0]
    assert stream.average_rate == scene.FPS
    read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
  assert np.shape(read) == frames.shape
  assert np.abs(np.subtract(read, frames, dtype=float)).mean() < 8
