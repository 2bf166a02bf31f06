"""Features on disk: encoded once, and again only if what they depend on changes."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from vlmrlaif_jax.data import features
from vlmrlaif_jax.data.processors.interface import Grid, Visual
from vlmrlaif_jax.data.processors.llava import LlavaProcessor
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.data.video import MediaList
from vlmrlaif_jax.data.world import scene

SIZE, COUNT = 16, 3
PROCESSOR = LlavaProcessor(COUNT, SIZE, SIZE)


@pytest.fixture
def clips(tmp_path):
  """Three videos."""
  rng = np.random.default_rng(0)
  paths = [tmp_path / f"v{i}.mp4" for i in range(3)]
  for path in paths:
    scene.write_mp4(path, scene.render_scene(scene.sample_scene(rng)))
  return [str(path) for path in paths]


class Encoder:
  """Each frame's mean colors as its one patch; counts the videos it is given."""

  def __init__(self):
    self.batches = []

  def __call__(self, videos):
    self.batches.append([video.pixels.shape for video in videos])
    mean = lambda pixels: pixels.mean((1, 2), dtype=np.float32)[:, None] / 255
    return [mean(video.pixels) for video in videos]


def build(paths, folder, encode=None, **changed):
  settings = dict(encoder="tower", processor=PROCESSOR, batch=2)
  settings |= dict(note=lambda text: None) | changed
  encode = Encoder() if encode is None else encode
  return features.build_feature_store(
    paths, folder / "features", encode=encode, workers=0, timeout_s=20.0, **settings,
  )  # fmt: skip


def test_features_are_the_encoders(clips, tmp_path):
  store = build(clips, tmp_path)
  pixels = features.video.load_frames(clips[1], count=COUNT, size=SIZE)
  expected = pixels.mean((1, 2))[:, None] / 255
  assert store.get_layout(clips[1]) == Visual(Grid(COUNT, 1, 1))
  assert store.get(clips[1]).dtype == np.float16
  np.testing.assert_allclose(store.get(clips[1]), expected, atol=1e-3)


def test_encoder_receives_a_batch_at_a_time(clips, tmp_path):
  encode = Encoder()
  build(clips, tmp_path, encode)
  one = (COUNT, SIZE, SIZE, 3)
  assert encode.batches == [[one, one], [one]]


def test_what_is_on_disk_is_not_decoded_again(clips, tmp_path, monkeypatch):
  before = build(clips, tmp_path)

  def decodes(videos, *args, **kwargs):
    assert not videos, "it was decoded again"
    return iter(())

  monkeypatch.setattr(features.video, "read_videos", decodes)
  again = build(clips, tmp_path)
  for clip in clips:
    np.testing.assert_array_equal(again.get(clip), before.get(clip))


def test_only_new_videos_are_encoded(clips, tmp_path):
  encode = Encoder()
  build(clips[:2], tmp_path)
  build(clips, tmp_path, encode, batch=1)
  assert len(encode.batches) == 1


def test_moved_video_is_not_encoded_again(clips, tmp_path):
  encode, moved = Encoder(), tmp_path / "moved.mp4"
  build(clips, tmp_path)
  (tmp_path / "v0.mp4").rename(moved)
  store = build([str(moved)], tmp_path, encode)
  assert encode.batches == [] and store.has(str(moved))


@pytest.mark.parametrize(
  "changed",
  [
    dict(encoder="another"),
    dict(processor=LlavaProcessor(4, SIZE, SIZE)),
    dict(processor=LlavaProcessor(COUNT, 24, 24)),
    dict(processor=LlavaProcessor(COUNT, SIZE, SIZE, (127, 127, 127))),
    dict(decoder="decord"),
  ],
)
def test_key_changes_with_what_features_depend_on(clips, tmp_path, changed):
  files = lambda **changed: set(build(clips, tmp_path, **changed).files.values())
  assert not files(**changed) & files()


def test_key_changes_with_the_way_in_which_videos_are_read(
  clips, tmp_path, monkeypatch
):
  files = lambda: set(build(clips, tmp_path).files.values())
  before = files()
  monkeypatch.setattr(features.video, "READING_VERSION", 0)
  assert not files() & before


def test_part_of_a_video_has_its_own_features(clips, tmp_path):
  part = f"{clips[0]}#t=0.5,1"
  store = build([clips[0], part, f"{clips[0]}#t=0.5,1.0"], tmp_path)
  assert store.failures == {} and len(used(tmp_path)) == 2
  pixels = features.video.load_frames(part, count=COUNT, size=SIZE)
  expected = pixels.mean((1, 2))[:, None] / 255
  np.testing.assert_allclose(store.get(part), expected, atol=1e-3)
  assert np.abs(store.get(part) - store.get(clips[0])).max() > 1e-3


@pytest.mark.parametrize("name", ["pipe.mp4", "/dev/zero"])
def test_device_or_pipe_is_a_failure_and_is_not_hashed(tmp_path, name):
  os.mkfifo(tmp_path / "pipe.mp4")
  path = str(tmp_path / name)
  assert "not a regular file" in build([path], tmp_path).failures[path]


def test_key_changes_with_the_content(clips, tmp_path):
  before = build(clips[:1], tmp_path).get(clips[0])
  (tmp_path / "v0.mp4").write_bytes((tmp_path / "v1.mp4").read_bytes())
  after = build(clips[:1], tmp_path).get(clips[0])
  assert np.abs(after - before).max() > 1e-3


def test_broken_video_is_a_failure_with_its_reason(clips, tmp_path):
  broken = tmp_path / "broken.mp4"
  broken.write_bytes(b"no video at all")
  store = build([str(broken), *clips], tmp_path)
  assert not store.has(str(broken)) and all(map(store.has, clips))
  assert len(store.failures[str(broken)]) > 5
  assert len(list((tmp_path / "features").iterdir())) == 3


def test_missing_video_is_a_failure_with_its_reason(clips, tmp_path):
  gone = str(tmp_path / "gone.mp4")
  store = build([gone, clips[0]], tmp_path)
  assert "no such file" in store.failures[gone] and store.has(clips[0])


def test_broken_video_is_tried_again_once_it_is_mended(clips, tmp_path):
  broken = tmp_path / "broken.mp4"
  broken.write_bytes(b"no video at all")
  build([str(broken)], tmp_path)
  broken.write_bytes((tmp_path / "v0.mp4").read_bytes())
  assert build([str(broken)], tmp_path).failures == {}


def test_frames_of_a_folder_and_of_a_list_are_videos(tmp_path):
  from PIL import Image

  folder = tmp_path / "frames"
  folder.mkdir()
  for i in range(5):
    pixels = np.full((20, 20, 3), 40 * i, np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  listed = [str(path) for path in sorted(folder.iterdir())]
  store = build([str(folder), listed], tmp_path)
  assert store.failures == {}
  np.testing.assert_array_equal(store.get(str(folder)), store.get(listed))
  levels = store.get(listed)[:, 0, 0] * 255
  assert levels[0] < levels[1] < levels[2]


# A folder that several runs share.


def age(path, seconds):
  then = time.time() - seconds
  os.utime(path, (then, then))


def used(folder):
  return {path.name for path in (folder / "features").glob("*.npy")}


WRITER = """
import pathlib, sys, time
from tests.data import test_features as test
from vlmrlaif_jax.data import features
start, folder, *clips = sys.argv[1:]
while not pathlib.Path(start).exists():
  time.sleep(0.001)
store = test.build(clips, pathlib.Path(folder), batch=1)
print(sum(float(store.get(clip).astype("float64").sum()) for clip in clips))
"""


def test_processes_can_write_into_one_folder_at_a_time(clips, tmp_path):
  start, shared = tmp_path / "start", tmp_path / "shared"
  root = pathlib.Path(__file__).parents[2]
  writers = [
    subprocess.Popen(
      [sys.executable, "-c", WRITER, start, shared, *clips],
      cwd=root, stdout=subprocess.PIPE, text=True,
    )
    for _ in range(3)
  ]  # fmt: skip
  time.sleep(1.0)  # Until they have begun, most often; the claim holds anyway.
  start.touch()
  found = {writer.communicate(timeout=100)[0] for writer in writers}
  assert [writer.returncode for writer in writers] == [0, 0, 0]
  alone = build(clips, tmp_path)
  assert found == {f"{sum(float(alone.get(c).astype('f8').sum()) for c in clips)}\n"}
  names = {path.name for path in (shared / "features").iterdir()}
  assert names == used(tmp_path) and len(names) == 3


@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten"])
def test_damaged_features_are_reported_and_encoded_again(clips, tmp_path, damage):
  before, said = build(clips, tmp_path), []
  file = before.files[clips[1]]
  whole = file.read_bytes()
  file.write_bytes({"cut": whole[:-20], "emptied": b"", "overwritten": b"x"}[damage])
  encode = Encoder()
  after = build(clips, tmp_path, encode, batch=1, note=said.append)
  assert len(encode.batches) == 1 and file.read_bytes() == whole
  assert any(str(file) in line for line in said)
  assert after.get(clips[1]).shape == (COUNT, 1, 3)


def test_leftovers_of_killed_writers_go_and_files_being_written_stay(clips, tmp_path):
  folder = tmp_path / "features"
  folder.mkdir()
  old, new = (folder / f"{c * 32}.npy.{c * 32}.tmp" for c in "ab")
  old.touch()
  new.touch()
  age(old, 2 * features.STALE_S)
  build(clips[:1], tmp_path)
  assert not old.exists() and new.exists()


# Memory and time.


def test_memory_holds_what_fits_and_the_rest_is_read_from_disk(clips, tmp_path):
  all_held = build(clips, tmp_path)
  one = all_held.get(clips[0]).nbytes
  store = build(clips, tmp_path, memory_gb=2.5 * one / features.GB)
  for _ in range(2):
    for clip in clips:
      np.testing.assert_array_equal(store.get(clip), all_held.get(clip))
  assert set(store.cached) == set(clips[:2])


def test_videos_are_decoded_while_others_are_encoded(clips, tmp_path, monkeypatch):
  fourth = threading.Event()

  def decode(videos, reading, **settings):
    for number, _ in enumerate(videos):
      if number == 3:
        fourth.set()
      pixels = np.zeros((COUNT, SIZE, SIZE, 3), np.uint8)
      yield features.video.Frames(pixels, np.zeros(COUNT), (SIZE, SIZE))

  def encode(videos):
    assert fourth.wait(10), "nothing was decoded meanwhile"
    return Encoder()(videos)

  monkeypatch.setattr(features.video, "read_videos", decode)
  videos = [str(tmp_path / f"{i}") for i in range(5)]
  for i, path in enumerate(videos):
    pathlib.Path(path).write_bytes(bytes([i]))
  assert len(build(videos, tmp_path, encode).files) == 5


def test_all_processes_check_as_often_as_the_one_that_has_most_to_do(clips, tmp_path):
  checked = []
  beside_five = lambda make: [make(), 5]  # Another process has five batches.
  build(clips, tmp_path, check=lambda: checked.append(1), share=beside_five)
  assert len(checked) == 5 and len(used(tmp_path)) == 3


def test_a_build_that_is_to_end_keeps_what_it_made(clips, tmp_path):
  class Ended(Exception):
    pass

  def end():
    raise Ended

  with pytest.raises(Ended):
    build(clips, tmp_path, batch=1, check=end)
  assert len(used(tmp_path)) == 1


# Videos with layouts of their own.


class EachPatch:
  """Two features per temporal patch: its number, and that of all."""

  def __call__(self, videos):
    times = [video.grid.time for video in videos]
    return [np.array([[[t, time]] * 2 for t in range(time)]) for time in times]


OWN = Qwen3VLProcessor(patch=4, min_pixels=64, max_pixels=6 * 64, fps=4.0)


def test_layout_of_a_video_is_saved_next_to_its_features(clips, tmp_path):
  store = build(clips[:1], tmp_path, EachPatch(), processor=OWN)
  layout = store.get_layout(clips[0])
  assert layout.grid == Grid(len(layout.seconds) // 2, 2, 2)
  assert np.ptp(np.diff(layout.seconds)) < 0.2 and layout.seconds[0] == 0
  duration = scene.SCENE_FRAMES / scene.FPS
  assert layout.rate == pytest.approx(len(layout.seconds) / duration)
  encode = Encoder()
  again = build(clips[:1], tmp_path, encode, processor=OWN)
  assert again.layouts == store.layouts and encode.batches == []


def test_features_without_their_layout_are_encoded_again(clips, tmp_path):
  store = build(clips[:1], tmp_path, EachPatch(), processor=OWN)
  store.files[clips[0]].with_suffix(".json").unlink()
  again = build(clips[:1], tmp_path, EachPatch(), processor=OWN)
  assert again.layouts == store.layouts


def test_features_are_padded_to_one_length_and_parts_are_temporal_patches(
  clips, tmp_path
):
  store = build(clips[:1], tmp_path, EachPatch(), processor=OWN)._replace(length=20)
  time = store.get_layout(clips[0]).grid.time
  whole, part = store.stack(clips[:1])[0], store.get(clips[0], 1, 3)
  assert len(whole) == len(part) == 20
  np.testing.assert_array_equal(whole[:, 1], [time] * 2 * time + [0] * (20 - 2 * time))
  np.testing.assert_array_equal(part[:, 0], [1, 1, 2, 2] + [0] * 16)


def test_features_of_a_part_are_arranged_as_those_of_a_video(clips, tmp_path):
  end = lambda x: np.concatenate([x.reshape(-1, 2), [[-1, -1]]])  # Such as a newline.
  store = build(clips[:1], tmp_path, EachPatch(), processor=OWN)
  part = store._replace(length=8, arrange=lambda x, _: end(x)).get(clips[0], 1, 3)
  np.testing.assert_array_equal(part[:, 0], [1, 1, 2, 2, -1, 0, 0, 0])


def test_features_of_several_videos_follow_each_other(clips, tmp_path):
  broken = str(tmp_path / "gone.mp4")
  store = build([*clips[:2], broken], tmp_path, EachPatch(), processor=OWN)
  both, again = MediaList((clips[1], clips[0])), MediaList((clips[0], clips[1]))
  parts = [store.get(path) for path in both.paths]
  padded = store._replace(length=40).stack([both, clips[0]])
  assert padded.shape[:2] == (2, 40) and len(parts[0]) + len(parts[1]) < 40
  np.testing.assert_array_equal(store.get(both), np.concatenate(parts))
  np.testing.assert_array_equal(padded[0, : len(store.get(both))], store.get(both))
  np.testing.assert_array_equal(padded[1, : len(parts[1])], parts[1])
  assert len({store.digest(x) for x in (both, again, *both.paths)}) == 4
  assert store.has(both) and not store.has(MediaList((clips[0], broken)))
  reason = store.get_failure(MediaList((clips[0], broken)))
  assert reason == store.failures[broken]


def test_a_video_of_unsupported_sides_is_a_failure(tmp_path):
  path = tmp_path / "line.png"
  Image.fromarray(np.zeros((4, 1000, 3), np.uint8)).save(path)
  store = build([str(path)], tmp_path, EachPatch(), processor=OWN)
  assert "200" in store.failures[str(path)]
