"""Pictures and animations with their orientation, depth, times and transparency."""

import os

import numpy as np
import pytest
from PIL import Image

from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.decoding import files
from vlmrlaif_jax.data.video import ByCount, Reading, VideoError, decode_video

RED, BLUE = (255, 0, 0), (0, 0, 255)


def draw_halves():
  """Red above, blue below."""
  picture = np.zeros((40, 20, 3), np.uint8)
  picture[:20], picture[20:] = RED, BLUE
  return picture


# How each EXIF orientation stores a picture that stands upright.
STORED = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x),
  7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
  8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_stand_upright(tmp_path, orientation, suffix):
  upright = draw_halves()
  upright[:, :10] //= 2  # Darker on the left, so that a mirrored one differs.
  exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
  exif[0x112] = orientation
  stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
  stored.save(path, exif=exif, quality=100, lossless=True)
  (found,) = decode_video(path, 1)
  assert found.shape == upright.shape
  inner = np.s_[5:15, 3:7]  # Away from edges, which JPEG blurs.
  assert np.abs(found[inner].astype(int) - upright[inner]).max() < 40


def test_damaged_exif_data_are_ignored(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header")
  assert decode_video(tmp_path / "a.png", 1).shape == (1, 4, 4, 3)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
  ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
  Image.fromarray(ramp).save(tmp_path / "ramp.png")
  (found,) = decode_video(tmp_path / "ramp.png", 1)
  np.testing.assert_array_equal(found[0, :, 0], np.arange(256))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
  path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
  Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
  np.testing.assert_array_equal(decode_video(path, 1), 255)


def test_what_is_transparent_is_white(tmp_path):
  picture = np.zeros((1, 3, 4), np.uint8)
  picture[0, :, 3] = [0, 255, 51]  # Black, of which 0, 100 and 20 % cover the white.
  Image.fromarray(picture).save(tmp_path / "a.png")
  assert decode_video(tmp_path / "a.png", 1)[0, 0, :, 0].tolist() == [255, 0, 204]


# Animations.

DURATIONS_MS = [100, 200, 300, 50, 5, 500]
LEVELS = [0, 40, 80, 120, 160, 200]


def write_animation(path, **settings):
  pictures = [Image.new("RGB", (8, 8), (level,) * 3) for level in LEVELS]
  pictures[0].save(
    path, save_all=True, append_images=pictures[1:], duration=DURATIONS_MS, **settings
  )
  return path


@pytest.mark.parametrize(
  ("suffix", "settings"), [("gif", {}), ("png", {}), ("webp", {"lossless": True})]
)
@pytest.mark.parametrize("name", ["a.{}", "renamed.mp4"])
def test_animations_have_frames_and_times(tmp_path, suffix, settings, name):
  path = write_animation(tmp_path / f"a.{suffix}", **settings)
  path = path.rename(tmp_path / name.format(suffix))
  # 5 ms count as 100 ms, as in browsers: the last frame starts at 0.75 s.
  found = video.read_video(path, Reading(ByCount(16)))
  assert sorted({round(s, 3) for s in found.seconds}) == [0, 0.1, 0.3, 0.6, 0.65, 0.75]
  times = np.linspace(0, 0.75, 16)
  starts = np.array([0, 0.1, 0.3, 0.6, 0.65, 0.75])
  expected = [LEVELS[(starts <= t + 1e-9).sum() - 1] for t in times]
  assert found.pixels[:, 0, 0, 0].tolist() == expected


def test_part_of_an_animation(tmp_path):
  path = write_animation(tmp_path / "a.gif")
  found = decode_video(f"{path}#t=0.3,0.65", 3)[:, 0, 0, 0].tolist()
  assert found == [80, 120, 160]


def test_picture_for_other_programs_is_no_frame_of_an_animation(tmp_path):
  path = write_animation(tmp_path / "a.png", default_image=True)
  assert decode_video(path, 2)[:, 0, 0, 0].tolist() == [40, 200]


# Folders, limits, formats.


def test_hidden_files_are_no_frames(tmp_path):
  for index in range(3):
    Image.new("RGB", (4, 4), (index,) * 3).save(tmp_path / f"{index}.png")
    (tmp_path / f"._{index}.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
  (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
  assert decode_video(tmp_path, 3)[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_part_of_frame_images_is_an_error(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
  with pytest.raises(VideoError, match="frame images have no times"):
    decode_video(f"{tmp_path}#t=1,2", 1)


def test_large_picture_is_an_error_before_it_is_decoded(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "MAX_PIXELS", 99)
  Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
  with pytest.raises(VideoError, match="10 x 10 pixels; at most 99 pixels"):
    decode_video(tmp_path / "a.png", 1)


def test_postscript_by_the_name_of_a_picture_is_not_run(tmp_path):
  path = tmp_path / "01.jpg"
  path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
  with pytest.raises(VideoError, match="cannot identify image file"):
    decode_video([str(path)], 1)


def test_pipe_among_frames_is_an_error(tmp_path):
  os.mkfifo(tmp_path / "0.png")
  with pytest.raises(VideoError, match="not a regular file"):
    decode_video(tmp_path, 1)
