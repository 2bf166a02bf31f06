"""Features on disk: made once, anew only if what they depend on has changed."""

import numpy as np
import pytest

from vlmrlaif_jax.data import features
from vlmrlaif_jax.data.world import scene

SIZE, COUNT = 16, 3


@pytest.fixture
def clips(tmp_path):
  """Three videos."""
  rng = np.random.default_rng(0)
  paths = [tmp_path / f"v{i}.mp4" for i in range(3)]
  for path in paths:
    scene.write_mp4(path, scene.render(scene.sample_scene(rng)))
  return [str(path) for path in paths]


class Encoder:
  """Each frame's mean colors as its one patch; counts the videos it is given."""

  def __init__(self):
    self.batches = []

  def __call__(self, pixels):
    self.batches.append(pixels.shape)
    return pixels.mean((2, 3), dtype=np.float32)[:, :, None] / 255


def build(paths, folder, encode=None, **changed):
  settings = dict(encoder="tower", count=COUNT, size=SIZE, batch=2) | changed
  encode = Encoder() if encode is None else encode
  return features.build(
    paths, folder / "features", encode=encode, workers=0, timeout_s=20.0,
    note=lambda text: None, **settings,
  )  # fmt: skip


def test_features_are_the_encoders(clips, tmp_path):
  store = build(clips, tmp_path)
  pixels, _ = features.video.load_many(
    [("v", clips[1])], count=COUNT, size=SIZE, workers=0, timeout_s=20.0
  )
  expected = pixels["v"].mean((1, 2))[:, None] / 255
  assert store.get(clips[1]).dtype == np.float16
  np.testing.assert_allclose(store.get(clips[1]), expected, atol=1e-3)


def test_encoder_sees_one_shape_only(clips, tmp_path):
  encode = Encoder()
  build(clips, tmp_path, encode)
  assert encode.batches == [(2, COUNT, SIZE, SIZE, 3)] * 2


def test_what_is_on_disk_is_not_decoded_again(clips, tmp_path, monkeypatch):
  before = build(clips, tmp_path)

  def decodes(*args, **kwargs):
    raise AssertionError("it was decoded again")

  monkeypatch.setattr(features.video, "load_many", decodes)
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
  "changed", [dict(encoder="another"), dict(count=4), dict(size=24)]
)
def test_key_changes_with_what_features_depend_on(clips, tmp_path, changed):
  files = lambda **changed: set(build(clips, tmp_path, **changed).files.values())
  assert not files(**changed) & files()


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
  assert "No such file" in store.failures[gone] and store.has(clips[0])


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
