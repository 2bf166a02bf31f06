"""Exact frames at known times, of every container and codec, and their metadata."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.helpers.numbered import (
  FRAMES,
  RATE,
  draw_number,
  read_numbers,
  write_numbered,
)
from vlmrlaif_jax.data.decoding import containers
from vlmrlaif_jax.data.decoding.sampling import sample_frame_indices
from vlmrlaif_jax.data.video import (
  ByCount,
  Reading,
  VideoError,
  decode_video,
  read_video,
)

B_FRAMES = {"options": {"bf": "2"}}
OPEN_GOP = {"options": {"x265-params": "open-gop=1:bframes=4:log-level=none"}}
CLIPS = {
  "b_frames.mp4": B_FRAMES,
  "fragmented.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
  "open.mp4": {"options": {"x264-params": "open-gop=1:bframes=3"}},
  "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
  "hevc.mp4": {"codec": "libx265", **OPEN_GOP},
  "prores.mov": {"codec": "prores_ks", "pixels": "yuv422p10le"},
  "hevc.mkv": {"codec": "libx265", **OPEN_GOP},
  "xvid.mkv": {"codec": "mpeg4", **B_FRAMES},
  "alt_ref.webm": {
    "codec": "libvpx",
    "options": {"auto-alt-ref": "1", "lag-in-frames": "16"},
  },
  "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
  "xvid.avi": {"codec": "mpeg4", **B_FRAMES},
  "h264.avi": {"gop": 30},
  "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
  "h264.ts": {},
  "hevc.ts": {"codec": "libx265", **OPEN_GOP},
  "mpeg2.ts": {"codec": "mpeg2video", **B_FRAMES},
  "mpeg1.mpg": {"codec": "mpeg1video", **B_FRAMES},
  "mpeg2.vob": {"codec": "mpeg2video", **B_FRAMES},
  "h264.flv": {},
  "sorenson.flv": {"codec": "flv"},
  "wmv2.wmv": {"codec": "wmv2"},
  "h263.3gp": {"codec": "h263", "height": 144, "width": 176},
  "mpeg2.mxf": {"codec": "mpeg2video", **B_FRAMES},
  "raw.h264": {"format": "h264"},
  "raw.m2v": {"codec": "mpeg2video", **B_FRAMES},
  "raw.mjpeg": {"codec": "mjpeg", "pixels": "yuvj420p"},
}


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_that_were_asked_for(tmp_path, name):
  path = write_numbered(tmp_path / name, **CLIPS[name])
  for count in (5, FRAMES):
    found = read_video(path, Reading(ByCount(count)))
    expected = sample_frame_indices(FRAMES, count)
    assert read_numbers(found.pixels) == expected.tolist()
    np.testing.assert_allclose(found.seconds, expected / RATE, atol=2e-3)


SEEKABLE = [name for name in CLIPS if name.endswith((".mp4", ".mov", ".mkv", ".webm"))]


@pytest.mark.parametrize("name", SEEKABLE)
def test_frames_after_a_seek_are_those_of_plain_decoding(tmp_path, monkeypatch, name):
  path = write_numbered(tmp_path / name, **CLIPS[name])
  with av.open(str(path)) as container:
    plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
  monkeypatch.setattr(containers, "MIN_SKIP", 1)
  for first in range(0, FRAMES - 1, 4):
    start = first / RATE
    found = decode_video(f"{path}#t={start:.3f},{start + 1 / RATE:.3f}", 2)
    np.testing.assert_array_equal(found, plain[first : first + 2])


def test_groups_without_a_frame_are_skipped(tmp_path, monkeypatch):
  path = write_numbered(tmp_path / "a.mp4", **B_FRAMES)
  monkeypatch.setattr(containers, "MIN_SKIP", 1)
  starts = containers._list_starts([0, 12, 24, 36, 48], {0, 30, 59})
  assert list(starts) == [24, 48]
  monkeypatch.setattr(containers, "_decode_in_order", None)  # Seeking must do.
  assert read_numbers(decode_video(path, 3)) == [0, 29, 59]


def test_variable_rate_shows_the_frames_at_even_times(tmp_path):
  times = [i * 40 if i < 40 else 1600 + (i - 40) * 400 for i in range(FRAMES)]
  path = write_numbered(tmp_path / "a.mp4", milliseconds=times, **B_FRAMES)
  found = read_video(path, Reading(ByCount(12)))
  expected = [
    max(i for i in range(FRAMES) if times[i] * 11 <= k * times[-1]) for k in range(12)
  ]
  assert read_numbers(found.pixels) == expected
  np.testing.assert_allclose(found.seconds, np.array(times)[expected] / 1000, atol=1e-3)


def test_edit_list_omits_frames(tmp_path):
  path = write_numbered(tmp_path / "a.mp4", **B_FRAMES)
  data = bytearray(path.read_bytes())
  at = data.index(b"elst") + 16  # The time at which the only edit starts.
  with av.open(str(path)) as container:
    unit = container.streams.video[0].time_base
  (start,) = struct.unpack_from(">i", data, at)
  struct.pack_into(">i", data, at, start + round(5 / RATE / unit))
  path.write_bytes(data)
  assert read_numbers(decode_video(path, 4)) == [5, 23, 41, 59]


def test_clock_that_restarts_gives_all_frames(tmp_path):
  """Two transport streams in one file, as recorders write them."""
  parts = [write_numbered(tmp_path / f"{i}.ts", frames=30 * (i + 1)) for i in range(2)]
  path = tmp_path / "both.ts"
  path.write_bytes(b"".join(part.read_bytes() for part in parts))
  found = read_video(path, Reading(ByCount(90)))
  assert read_numbers(found.pixels) == [*range(30), *range(60)]
  assert (np.diff(found.seconds) > 0).all()


# The part that a name ends in.


@pytest.mark.parametrize("name", ["b_frames.mp4", "xvid.avi", "h264.ts", "hevc.mkv"])
def test_part_contains_both_ends_and_no_more(tmp_path, name):
  path = write_numbered(tmp_path / name, **CLIPS[name])
  found = read_video(f"{path}#t=0.4,1.2", Reading(ByCount(3)))
  assert read_numbers(found.pixels) == [10, 20, 30]
  np.testing.assert_allclose(found.seconds, [0.4, 0.8, 1.2], atol=1e-3)
  assert read_numbers(decode_video(f"{path}#t=2", 2)) == [50, 59]


def test_part_outside_of_the_video_is_an_error(tmp_path):
  path = write_numbered(tmp_path / "a.mp4")
  with pytest.raises(VideoError, match=r"starts at 9 s, but it lasts 2\.400 s"):
    decode_video(f"{path}#t=9,12", 2)


# Metadata.


def write_display_matrix(path, a, b, c, d):
  data = bytearray(path.read_bytes())
  at = data.index(b"tkhd") + 44  # Where version 0 of the track header has its matrix.
  values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
  data[at : at + 36] = struct.pack(">9i", *values)
  path.write_bytes(data)


@pytest.mark.parametrize(
  ("matrix", "turn"),
  [
    ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # Clockwise.
    ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    ((0, -1, 1, 0), lambda x: np.rot90(x)),
    ((-1, 0, 0, 1), lambda x: x[:, ::-1]),  # Mirrored, as by a front camera.
    ((1, 0, 0, -1), lambda x: x[::-1]),
    ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
  ],
)
def test_frames_stand_upright(tmp_path, matrix, turn):
  path = write_numbered(tmp_path / "a.mp4", frames=3)
  (stored,) = decode_video(path, 1)
  write_display_matrix(path, *matrix)
  np.testing.assert_array_equal(decode_video(path, 1)[0], turn(stored))


@pytest.mark.parametrize(
  ("aspect", "width"), [((2, 1), 128), ((8, 9), 57), ((1, 2), 32)]
)
def test_frames_have_the_shape_that_players_show(tmp_path, aspect, width):
  def set_aspect(stream):
    stream.codec_context.sample_aspect_ratio = Fraction(*aspect)

  path = write_numbered(tmp_path / "a.mp4", frames=3, width=64, setup=set_aspect)
  assert decode_video(path, 1).shape == (1, 64, width, 3)


COLOR = (200, 30, 60)


def write_color(path, pixels, matrix, color_range, codec="libx264"):
  """A clip of one color, encoded by a matrix and a range, which its header names."""
  with av.open(str(path), "w") as out:
    stream = out.add_stream(codec, rate=8)
    stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
    stream.codec_context.colorspace = {"ITU709": 1, "ITU601": 6, "BT2020": 9}[matrix]
    stream.codec_context.color_range = color_range
    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), COLOR, np.uint8), "rgb24")
    coded = frame.reformat(
      format=pixels, dst_colorspace=matrix, dst_color_range=color_range
    )
    out.mux(stream.encode(coded))
    out.mux(stream.encode())
  return path


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("matrix", ["ITU601", "ITU709", "BT2020"])
@pytest.mark.parametrize("color_range", [1, 2])  # Limited, full.
def test_colors_follow_matrix_range_and_depth(tmp_path, pixels, matrix, color_range):
  path = write_color(tmp_path / "a.mp4", pixels, matrix, color_range)
  (found,) = decode_video(path, 1)
  assert np.abs(found[16, 16].astype(int) - COLOR).max() <= 4


def test_ten_bits_keep_their_levels(tmp_path):
  ramp = np.linspace(64, 940, 128).astype(np.uint16)[None].repeat(64, 0)
  with av.open(str(tmp_path / "a.mkv"), "w") as out:
    stream = out.add_stream("ffv1", rate=8)
    stream.width, stream.height, stream.pix_fmt = 128, 64, "gray10le"
    frame = av.VideoFrame.from_ndarray(ramp, format="gray10le")
    out.mux(stream.encode(frame))
    out.mux(stream.encode())
  (found,) = decode_video(tmp_path / "a.mkv", 1)
  assert len(np.unique(found)) > 100 and found.max() > 230


def test_what_is_transparent_is_white(tmp_path):
  picture = np.zeros((32, 32, 4), np.uint8)
  picture[16:, :, 3] = 255  # Black below, transparent black above.
  with av.open(str(tmp_path / "a.mov"), "w") as out:
    stream = out.add_stream("png", rate=8)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "rgba"
    out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
    out.mux(stream.encode())
  (found,) = decode_video(tmp_path / "a.mov", 1)
  assert (found[0, 0, 0], found[31, 0, 0]) == (255, 0)


# Several streams.


def write_streams(path, sizes, covers=()):
  """Writes a stream of 3 frames for each height; frames show the index of theirs."""
  with av.open(str(path), "w") as out:
    streams = []
    for index, height in enumerate(sizes):
      is_cover = index in covers
      stream = out.add_stream("mjpeg" if is_cover else "libx264", rate=8)
      stream.width, stream.height = 2 * height, height
      stream.pix_fmt = "yuvj420p" if is_cover else "yuv420p"
      if is_cover:
        stream.disposition = Disposition.attached_pic
      streams.append(stream)
    for index, stream in enumerate(streams):
      for _ in range(1 if index in covers else 3):
        picture = draw_number(index, stream.height, stream.width)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
      out.mux(stream.encode())
  return path


def test_largest_video_stream_is_read(tmp_path):
  path = write_streams(tmp_path / "a.mkv", [32, 96, 64])
  assert read_numbers(decode_video(path, 3)) == [1, 1, 1]


def test_cover_picture_is_no_video(tmp_path):
  path = write_streams(tmp_path / "a.mp4", [64, 256], covers=[1])
  assert read_numbers(decode_video(path, 3)) == [0, 0, 0]


def test_file_with_only_a_cover_picture_is_an_error(tmp_path):
  path = write_streams(tmp_path / "a.mp4", [64], covers=[0])
  with pytest.raises(VideoError, match="no video stream, only a cover picture"):
    decode_video(path, 3)


# Untrusted files.


@pytest.mark.parametrize(
  "text",
  [
    "ffconcat version 1.0\nfile {name}\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{name}\n#EXT-X-ENDLIST\n",
  ],
  ids=["concat", "HLS"],
)
def test_playlist_opens_no_other_file(tmp_path, text):
  other = write_numbered(tmp_path / "private.ts", frames=3)
  path = tmp_path / "clip.mp4"
  path.write_text(text.format(name=other))
  with pytest.raises(VideoError, match=r"clip\.mp4: (its format|Invalid data)"):
    decode_video(path, 1)


@pytest.mark.parametrize("name", ["pipe.mp4", "/dev/zero"])
def test_device_or_pipe_is_an_error(tmp_path, name):
  os.mkfifo(tmp_path / "pipe.mp4")
  with pytest.raises(VideoError, match="not a regular file"):
    decode_video(tmp_path / name, 1)


def test_large_frames_are_an_error_before_they_are_decoded(tmp_path, monkeypatch):
  path = write_numbered(tmp_path / "a.mp4", frames=1, height=128, width=256)
  monkeypatch.setattr("vlmrlaif_jax.data.decoding.files.MAX_PIXELS", 9999)
  with pytest.raises(VideoError, match="256 x 128 pixels; at most 9999"):
    decode_video(path, 1)


def test_libraries_are_those_that_were_checked():
  """FFmpeg 8.1.2, which the oldest `av` of setup.py contains, or a later one."""
  assert tuple(map(int, av.ffmpeg_version_info.split(".")[:3])) >= (8, 1, 2)
