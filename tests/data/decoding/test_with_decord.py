"""decord, read in order: the frames of PyAV where it is used, else a refusal."""

import sys
from fractions import Fraction

import pytest

from tests.helpers.numbered import FRAMES, read_numbers, write_numbered
from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.decoding.sampling import sample_frame_indices
from vlmrlaif_jax.data.video import ByCount, Reading, VideoError, read_video

B_FRAMES = {"options": {"bf": "2"}}


def read(path, count):
  return read_video(path, Reading(ByCount(count), decoder="decord"))


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("a.mp4", B_FRAMES),
    ("a.mkv", B_FRAMES),
    ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}),
    ("xvid.avi", {"codec": "mpeg4", **B_FRAMES}),
    ("h264.avi", {}),
  ],
)
def test_frames_are_those_that_were_asked_for(tmp_path, name, settings):
  path = write_numbered(tmp_path / name, **settings)
  for count in (5, FRAMES):
    found = read(path, count)
    assert read_numbers(found.pixels) == sample_frame_indices(FRAMES, count).tolist()


def test_part_is_read(tmp_path):
  path = write_numbered(tmp_path / "a.mp4", **B_FRAMES)
  assert read_numbers(read(f"{path}#t=0.4,1.2", 3).pixels) == [10, 20, 30]


@pytest.mark.parametrize("name", ["a.ts", "a.mpg", "a.flv"])
def test_containers_in_which_it_is_not_exact_are_refused(tmp_path, name):
  codec = "mpeg2video" if name == "a.mpg" else "libx264"
  path = write_numbered(tmp_path / name, frames=12, codec=codec)
  with pytest.raises(VideoError, match=r"not exact for .* Set data.decoder to 'pyav'"):
    read(path, 2)


def test_pixels_that_are_not_square_are_refused(tmp_path):
  def set_aspect(stream):
    stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

  path = write_numbered(tmp_path / "a.mp4", frames=3, setup=set_aspect)
  with pytest.raises(VideoError, match="pixels that are not square"):
    read(path, 2)


def test_decoder_that_is_not_installed_is_an_error_with_the_remedy(monkeypatch):
  monkeypatch.setattr(sys, "path", [])
  monkeypatch.delitem(sys.modules, "decord", raising=False)
  with pytest.raises(ValueError, match=r"pip install \"vlmrlaif_jax\[decord\]\""):
    video.check_decoder("decord")


def test_unknown_decoder_is_an_error():
  with pytest.raises(ValueError, match=r"one of \['pyav', 'decord'\], not 'x'"):
    video.check_decoder("x")
