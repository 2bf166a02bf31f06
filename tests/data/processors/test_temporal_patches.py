"""Sizes of frames: resized by decoders, within limits, and from a short list."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tests.data.processors.clips import make_frames
from tests.data.test_video import write_video
from vlmrlaif_jax.data.processors.interface import (
  Visual,
  count_features,
  lay_out,
  process_frames,
)
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.data.processors.sizes import RATIOS, list_sizes
from vlmrlaif_jax.data.video import VideoError, read_video, read_videos

QWEN3, QWEN25 = Qwen3VLProcessor(), Qwen25VLProcessor()
BUDGET = 300_000
LIMITED = [each.limit(1.0, 12, BUDGET) for each in (QWEN3, QWEN25)]
FAMILIES = pytest.mark.parametrize("processor", LIMITED, ids=["qwen3", "qwen2.5"])


def write_images(folder, frames):
  for index, frame in enumerate(frames):
    Image.fromarray(frame).save(folder / f"{index}.png")
  return str(folder)


# Decoders.


@FAMILIES
@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoder_returns_frames_in_the_size_of_their_grid(
  tmp_path, processor, workers
):
  frames = make_frames(6, 400, 300)
  path, reading = write_images(tmp_path, frames), processor.make_reading("pyav")
  (read,) = read_videos([path], reading, workers=workers, timeout_s=60.0)
  grid = processor.choose_grid(400, 300, 6)
  size = grid.width * processor.patch, grid.height * processor.patch
  want = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in frames]
  np.testing.assert_array_equal(read.pixels, np.stack(want))
  assert process_frames(processor, read)[1].grid == grid


def test_frames_have_the_size_for_those_that_decode(tmp_path):
  """A file without its first key frame has 16 frames, but its packets predict 23."""
  import av

  whole, path = write_video(tmp_path / "whole.mp4", gop=8), tmp_path / "cut.mkv"
  with av.open(str(whole)) as source, av.open(str(path), "w") as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    for packet in list(source.demux(video=0))[1:]:
      if packet.size:
        packet.stream = stream
        target.mux(packet)
  processor = Qwen3VLProcessor(patch=4, fps=8.0, max_pixels=20_000, min_pixels=64)
  grids = [processor.choose_grid(64, 64, count)[1:] for count in (16, 23)]
  frames = read_video(path, processor.make_reading("pyav"))
  assert len(frames.pixels) == 16 and grids[0] != grids[1]
  assert frames.pixels.shape[1:3] == tuple(4 * side for side in grids[0])


def test_memory_of_wide_frames_is_that_of_one(tmp_path):
  frames = np.zeros((6, 150, 30_000, 3), np.uint8)
  path, each = write_images(tmp_path, frames), frames[0].nbytes
  tracemalloc.start()
  found = read_video(path, LIMITED[0].make_reading("pyav"))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert found.pixels.nbytes < each / 5 and peak < 4 * each


def test_frames_that_differ_in_size_are_an_error(tmp_path):
  for index, width in enumerate([64, 65]):
    Image.new("RGB", (width, 64)).save(tmp_path / f"{index}.png")
  with pytest.raises(VideoError, match=r"differ in size .*\(64, 64\), \(64, 65\)"):
    read_video(str(tmp_path), QWEN3.make_reading("pyav"))


def test_frames_of_another_size_are_an_error():
  grid = QWEN3.choose_grid(64, 64, 2)
  with pytest.raises(ValueError, match="frames of 64 x 96 pixels .* 64 x 64. Resize"):
    QWEN3.process(np.zeros((2, 64, 96, 3), np.uint8), grid)


# Limits.


@FAMILIES
def test_limits_bound_frames_and_pixels(processor):
  assert len(processor.sample_frames(100, 10.0)) == 10  # One per second.
  assert len(processor.sample_frames(1000, 10.0)) == 12
  for height, width in ((480, 640), (640, 480), (90, 200), (1080, 1920)):
    for count in (2, 4, 8, 12):
      _, *sides = processor.choose_grid(height, width, count)
      assert count * np.prod(sides) * processor.patch**2 <= BUDGET
    _, *sides = processor.choose_grid(height, width, None)
    assert np.prod(sides) * processor.patch**2 <= BUDGET


def test_zero_leaves_a_limit_as_it_is():
  assert QWEN3.limit(0.0, 0, 0) == QWEN3 and QWEN25.limit(0.0, 0, 0) == QWEN25
  assert QWEN3.limit(0.0, 9, 0) == Qwen3VLProcessor(max_frames=9)


@pytest.mark.parametrize(
  ("limits", "message"),
  [
    ((-1.0, 0, 0), "fps must be greater than 0, got -1.0"),
    ((float("nan"), 0, 0), "fps must be greater than 0, got nan"),
    ((0.0, 1, 0), "max_frames must be 2 or more, .* got 1"),
    ((0.0, 9, 10_239), "max_pixels must be 10240 or more, .* got 10239. Raise it"),
  ],
)
def test_limits_out_of_range_are_errors(limits, message):
  with pytest.raises(ValueError, match=message):
    QWEN3.limit(*limits)
  assert QWEN3.limit(0.0, 9, 10_240).max_pixels == 10_240  # A token of each frame.


# A short list of sizes.


@pytest.mark.parametrize("most", [1, 1024, 5000, 33_333, 125_000, 786_432])
def test_sizes_have_ratios_and_never_exceed_the_pixels(most):
  sizes = list_sizes(4096, most, 16, 2)
  assert max(rows * columns * 16**2 for rows, columns in sizes) <= max(most, 32**2)
  assert all(side % 2 == 0 for size in sizes for side in size)
  if most > 100_000:
    found = [columns / rows for rows, columns in sizes[: len(RATIOS)]]
    np.testing.assert_allclose(found, RATIOS, rtol=0.25)
    halves = [rows * columns for rows, columns in sizes]
    assert halves[len(RATIOS)] < 0.6 * halves[0]


@FAMILIES
def test_fixed_grids_depend_on_the_ratio_and_keep_the_limits(processor):
  fixed = processor.fix_grids()
  rng, used = np.random.default_rng(0), set()
  for height, width in rng.integers(60, 2000, (60, 2)).tolist():
    grids = {fixed.choose_grid(height, width, n)[1:] for n in (2, 3, 8, 12)}
    assert len(grids) == 1  # Whatever the number of frames.
    used |= grids
  sizes = list_sizes(*fixed.frame_limits, fixed.patch, fixed.merge)
  assert used <= set(sizes) and len(used) < 30
  assert all(12 * np.prod(size) * fixed.patch**2 <= BUDGET for size in used)
  wide, tall = (fixed.choose_grid(*s, 4) for s in ((900, 1600), (1600, 900)))
  assert wide.width > wide.height and tall.height > tall.width


def test_what_is_read_differs_with_each_setting():
  settings = [QWEN3, QWEN3.fix_grids(), LIMITED[0], QWEN3.limit(1.0, 0, 0)]
  assert len({each.make_reading("pyav").describe() for each in settings}) == 4


# The largest layout.


@FAMILIES
@pytest.mark.parametrize("is_fixed", [False, True])
def test_no_video_has_more_tokens_than_the_largest_layout(processor, is_fixed):
  processor = processor.fix_grids() if is_fixed else processor
  count = lambda visual: count_features(lay_out(processor, visual))
  most = count(processor.find_max_layout())
  assert len(processor.find_max_layout().seconds) <= 12
  for frames in range(2, 13, 1 if processor is not LIMITED[1] else 2):
    for height, width in ((1080, 1920), (2000, 2000), (480, 640), (210, 90)):
      grid = processor.choose_grid(height, width, frames)
      assert count(Visual(grid, tuple(range(frames)))) <= most
