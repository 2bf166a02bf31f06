"""Videos made here, read back; broken ones; decoding in processes that die or hang."""

import io
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from vlmrlaif_jax.data import worker_pool
from vlmrlaif_jax.data.decoding.squares import FILL
from vlmrlaif_jax.data.video import (
  ByCount,
  ByFps,
  Reading,
  VideoError,
  decode_video,
  load_frames,
  read_duration,
  read_video,
  read_videos,
  sample_frame_indices,
)

FRAMES = 24


def picture(index, height=64, width=64):
  """Brighter with time in red, a bar that grows in green, a blue upper quarter."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = 10 * index
  image[:, : (index + 1) * width // FRAMES, 1] = 200
  image[: height // 4, :, 2] = 255
  return image


def write_video(path, *, frames=FRAMES, height=64, width=64, codec="libx264", gop=250):
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=8)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.gop_size = gop
    for index in range(frames):
      image = av.VideoFrame.from_ndarray(picture(index, height, width), format="rgb24")
      container.mux(stream.encode(image))
    container.mux(stream.encode())
  return path


@pytest.fixture
def clip(tmp_path):
  return write_video(tmp_path / "clip.mp4")


def write_slow_animation(path):
  """A GIF of few bytes that takes minutes: one large frame, very often."""
  data = io.BytesIO()
  Image.new("L", (4000, 4000)).save(data, "GIF")
  header, frame = data.getvalue()[:-1].split(b",", 1)
  path.write_bytes(header + 3000 * (b"," + frame) + b";")
  return path


# Which frames.


@pytest.mark.parametrize(
  ("total", "count", "expected"),
  [
    (10, 4, [0, 3, 6, 9]),
    (24, 5, [0, 5, 11, 17, 23]),  # 5.75, 11.5 and 17.25, rounded down.
    (3, 5, [0, 0, 1, 1, 2]),
    (7, 1, [0]),
  ],
)
def test_frame_indices_are_even_and_rounded_down(total, count, expected):
  assert sample_frame_indices(total, count).tolist() == expected


@pytest.mark.parametrize(("total", "count"), [(0, 8), (8, 0)])
def test_frame_indices_of_nothing_are_an_error(total, count):
  with pytest.raises(ValueError, match=f"take {count} frames out of {total}"):
    sample_frame_indices(total, count)


# Decoding.


def test_decode_finds_the_pictures_that_were_written(clip):
  frames = decode_video(clip, 6)
  expected = np.stack([picture(i) for i in [0, 4, 9, 13, 18, 23]])
  assert frames.shape == expected.shape
  # Lossy compression: brightness is exact to a few units; the bar tells each frame.
  assert (
    np.abs(frames[:, 48:, 60, 0].mean(1) - expected[:, 48:, 60, 0].mean(1)).max() < 6
  )
  bars = (frames[:, 48, :, 1] > 100).sum(1)
  assert bars.tolist() == (expected[:, 48, :, 1] > 100).sum(1).tolist()


@pytest.mark.parametrize("count", [1, 5, 23, 24, 40])
@pytest.mark.parametrize("gop", [5, 250])
def test_pixels_are_those_of_plain_decoding(tmp_path, gop, count):
  path = str(write_video(tmp_path / "clip.mp4", gop=gop))
  with av.open(path) as container:
    plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
  expected = np.stack([plain[i] for i in sample_frame_indices(FRAMES, count)])
  np.testing.assert_array_equal(decode_video(path, count), expected)


def test_frames_spread_over_those_that_decode(tmp_path):
  """The first of three groups of 8 lacks its key frame: 23 packets hold 16 frames."""
  whole, path = write_video(tmp_path / "whole.mp4", gop=8), tmp_path / "cut.mkv"
  with av.open(str(whole)) as source, av.open(str(path), "w") as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    for packet in list(source.demux(video=0))[1:]:
      if packet.size:
        packet.stream = stream
        target.mux(packet)
  frames = decode_video(path, 16)
  np.testing.assert_array_equal(frames, decode_video(whole, FRAMES)[8:])


def test_decode_repeats_frames_of_a_short_video(tmp_path):
  path = write_video(tmp_path / "short.mp4", frames=3)
  frames = decode_video(path, 5)
  three = decode_video(path, 3)
  np.testing.assert_array_equal(frames, three[[0, 0, 1, 1, 2]])


# Images.


def test_folder_is_read_in_natural_order(tmp_path):
  for index in [10, 9, 1, 2]:
    Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / f"frame_{index}.png")
  (tmp_path / "notes.txt").write_text("no image")
  assert decode_video(tmp_path, 4)[:, 0, 0, 0].tolist() == [1, 2, 9, 10]


def test_list_of_images_keeps_its_order(tmp_path):
  paths = [str(tmp_path / name) for name in ["b.png", "a.png"]]
  for value, path in enumerate(paths):
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)
  assert decode_video(paths, 2)[:, 0, 0, 0].tolist() == [0, 1]


def test_image_is_a_video_of_one_frame(tmp_path):
  Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "a.png")
  np.testing.assert_array_equal(
    decode_video(tmp_path / "a.png", 2), np.full((2, 4, 6, 3), [1, 2, 3], np.uint8)
  )


# Broken.


def cut_in_half(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  ("spoil", "reason"),
  [
    (cut_in_half, "Invalid data"),
    (lambda path: path.write_bytes(b""), "Invalid data"),
    (lambda path: path.write_text("Not a video.\n" * 99), "Invalid data"),
    (lambda path: path.unlink(), "no such file"),
    (lambda path: (path.unlink(), path.mkdir()), "contains no images"),
  ],
)
def test_broken_file_is_an_error_with_path_and_reason(clip, spoil, reason):
  spoil(clip)
  with pytest.raises(VideoError, match=f"clip.mp4: .*{reason}"):
    load_frames(clip, count=4, size=8)


@pytest.mark.parametrize(
  ("path", "reason"), [([], "no frames"), ("x" * 999, "too long")]
)
def test_path_that_cannot_be_is_an_error(path, reason):
  with pytest.raises(VideoError, match=reason):
    decode_video(path, 4)


def test_sound_alone_is_an_error(tmp_path):
  with av.open(str(tmp_path / "a.mp4"), "w") as container:
    stream = container.add_stream("aac", rate=8000, layout="mono")
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    sound.sample_rate = 8000
    container.mux(stream.encode(sound))
    container.mux(stream.encode())
  with pytest.raises(VideoError, match="no video stream"):
    decode_video(tmp_path / "a.mp4", 2)


def test_frames_of_different_sizes_are_an_error_only_unfitted(tmp_path):
  for index, width in enumerate([4, 6]):
    Image.new("RGB", (width, 4)).save(tmp_path / f"{index}.png")
  with pytest.raises(VideoError, match=r"differ in size .*\(4, 4\), \(4, 6\)"):
    decode_video(tmp_path, 2)
  assert load_frames(tmp_path, count=2, size=8).shape == (2, 8, 8, 3)


# Square, resized, normalised.


@pytest.mark.parametrize(("height", "width"), [(5, 8), (8, 5)])
def test_frames_are_padded_on_both_sides(tmp_path, height, width):
  Image.new("RGB", (width, height), (9, 9, 9)).save(tmp_path / "0.png")
  (frame,) = load_frames(tmp_path, count=1, size=8)
  short = frame.min(axis=2).min(axis=int(height < width))
  # 3 too few: 1 before and 2 after, in the fill's lowest channel.
  assert short.tolist() == [FILL[2]] + [9] * 5 + [FILL[2]] * 2


def test_frames_are_resized_as_transformers_does(tmp_path):
  frame = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
  padded = Image.new("RGB", (64, 64), FILL)
  padded.paste(Image.fromarray(frame), (0, 12))
  side = {"height": 28, "width": 28}
  processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side)
  theirs = processor(padded, return_tensors="np", do_normalize=False, do_rescale=False)
  Image.fromarray(frame).save(tmp_path / "0.png")
  (ours,) = load_frames(tmp_path, count=1, size=28)
  np.testing.assert_array_equal(ours.transpose(2, 0, 1), theirs["pixel_values"][0])


# Times, and what a reading asks for.


def test_frames_by_fps_have_their_times(tmp_path):
  """24 frames at 8 a second: 3 s, of which 2 frames a second are read."""
  path = write_video(tmp_path / "clip.mp4")
  found = read_video(path, Reading(ByFps(2.0, min_frames=4, max_frames=64)))
  expected = sample_frame_indices(FRAMES, 6)
  np.testing.assert_allclose(found.seconds, expected / 8)
  np.testing.assert_array_equal(found.pixels, decode_video(path, FRAMES)[expected])


def test_frame_images_count_as_sampled_at_the_fps(tmp_path):
  for index in range(5):
    Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
  found = read_video(tmp_path, Reading(ByFps(2.0, min_frames=1, max_frames=64)))
  assert found.seconds.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_frames_are_shrunk_within_limits_and_never_enlarged(tmp_path):
  path = write_video(tmp_path / "clip.mp4", frames=3, width=96)
  shape = lambda within: (
    read_video(path, Reading(ByCount(1), within=within)).pixels.shape
  )
  assert shape((48, 48)) == (1, 32, 48, 3)
  assert shape((500, 500)) == (1, 64, 96, 3)


def test_description_names_all_that_frames_depend_on():
  reading = Reading(ByCount(4), square=8)
  others = [
    Reading(ByCount(5), square=8),
    Reading(ByFps(4.0, 1, 9), square=8),
    Reading(ByCount(4), square=9),
    Reading(ByCount(4), square=8, decoder="decord"),
  ]
  assert reading.describe() not in {other.describe() for other in others}


@pytest.mark.parametrize("end", ["#t=1,2", "#t=,2"])
def test_part_of_a_missing_video_is_an_error_with_its_name(tmp_path, end):
  with pytest.raises(VideoError, match=f"a.mp4{end}: there is no such file"):
    decode_video(f"{tmp_path}/a.mp4{end}", 2)


def test_duration_is_that_of_the_file_or_of_its_part(tmp_path):
  path = write_video(tmp_path / "clip.mp4")
  assert read_duration(path, timeout_s=60.0) == pytest.approx(3.0)
  assert read_duration(f"{path}#t=1,1.5", timeout_s=60.0) == pytest.approx(0.5)


# Many.

SETTINGS = {"reading": Reading(ByCount(4), square=8), "timeout_s": 120.0}


def write_clips(folder, count):
  clips = [str(folder / f"{i}.mp4") for i in range(count)]
  for index, path in enumerate(clips):
    write_video(path, frames=3 + index)
  return clips


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_read_videos_is_load_frames_in_turn(tmp_path, workers):
  clips = write_clips(tmp_path, 4)
  missing = str(tmp_path / "missing.mp4")
  reason, *loaded = read_videos([missing, *clips], workers=workers, **SETTINGS)
  assert reason == "there is no such file or folder"
  for path, frames in zip(clips, loaded, strict=True):
    np.testing.assert_array_equal(frames.pixels, load_frames(path, count=4, size=8))


def test_read_videos_reads_lists_of_images(tmp_path):
  images = [str(tmp_path / f"{i}.png") for i in range(2)]
  for image in images:
    Image.new("RGB", (4, 4), (7, 7, 7)).save(image)
  (frames,) = read_videos([images], workers=1, **SETTINGS)
  assert (frames.pixels == 7).all()


def test_video_that_hangs_fails_alone_when_its_time_is_up(tmp_path):
  clips = write_clips(tmp_path, 3)
  stuck = str(write_slow_animation(tmp_path / "slow.gif"))
  settings = SETTINGS | {"timeout_s": 4.0}
  reason, *loaded = read_videos([stuck, *clips], workers=1, **settings)
  assert reason == "no answer within 4 s"
  assert [frames.pixels.shape for frames in loaded] == [(4, 8, 8, 3)] * 3


SCRIPT = """
from vlmrlaif_jax.data.video import ByCount, Reading, read_videos
reading = Reading(ByCount(4), square=8)
(frames,) = read_videos([{path!r}], reading, workers=1, timeout_s=60.0)
print(frames.pixels.shape)
"""


@pytest.mark.parametrize("how", ["script", "-c", "notebook"])
def test_caller_needs_no_main_guard_and_no_file(tmp_path, how):
  """A notebook runs cells in a module that has no file, as the standard input does."""
  [path] = write_clips(tmp_path, 1)
  code, script = SCRIPT.format(path=path), tmp_path / "script.py"
  script.write_text(code)
  arguments = {"script": [str(script)], "-c": ["-c", code], "notebook": ["-"]}[how]
  done = subprocess.run(
    [sys.executable, *arguments],
    input=code,
    env=os.environ | {"PYTHONPATH": str(worker_pool.ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.stdout == "(4, 8, 8, 3)\n", done.stderr


def test_worker_imports_no_jax():
  code = "import sys, vlmrlaif_jax.data.video; print('jax' in sys.modules)"
  environment = os.environ | {"PYTHONPATH": str(worker_pool.ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True
  )
  assert done.stdout == "False\n", done.stderr
