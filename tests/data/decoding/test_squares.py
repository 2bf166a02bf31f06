"""Padding in bands equals padding to a square, in little memory."""

import numpy as np
import pytest
from PIL import Image

from vlmrlaif_jax.data.decoding import squares
from vlmrlaif_jax.data.decoding.squares import FILL, pad_and_resize


def pad_first(frame, size):
  """Pads to a square and resizes it, as LLaVA's expand2square does."""
  height, width = frame.shape[:2]
  side = max(height, width)
  top, left = (side - height) // 2, (side - width) // 2
  square = np.full((side, side, 3), FILL, np.uint8)
  square[top : top + height, left : left + width] = frame
  return np.asarray(Image.fromarray(square).resize((size, size), Image.BICUBIC))


def draw_noise(height, width):
  return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


SHAPES = [(64, 64), (72, 128), (129, 71), (1, 1), (1, 300), (300, 1), (5, 8), (200, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [8, 28, 336])
@pytest.mark.parametrize("band", [squares.BAND_PIXELS, 500])
def test_frames_equal_those_that_are_padded_first(monkeypatch, shape, size, band):
  monkeypatch.setattr(squares, "BAND_PIXELS", band)
  frame = draw_noise(*shape)
  found = np.asarray(pad_and_resize(Image.fromarray(frame), size))
  np.testing.assert_array_equal(found, pad_first(frame, size))


@pytest.mark.parametrize("shape", SHAPES)
def test_frames_with_cut_padding_are_off_by_rounding(monkeypatch, shape):
  monkeypatch.setattr(squares, "EXACT_SIDE", 0)
  frame = draw_noise(*shape)
  found = np.asarray(pad_and_resize(Image.fromarray(frame), 28)).astype(int)
  assert np.abs(found - pad_first(frame, 28)).max() <= 2


@pytest.mark.parametrize("shape", [(30_000, 4), (4, 30_000)])
def test_memory_of_a_narrow_frame_is_that_of_its_area(monkeypatch, shape):
  """A square of 30,000 pixels takes 2.7 GB; no picture here has 10 million pixels."""
  sizes, new = [], Image.new
  monkeypatch.setattr(
    Image, "new", lambda mode, size, *fill: sizes.append(size) or new(mode, size, *fill)
  )
  pad_and_resize(Image.fromarray(np.zeros((*shape, 3), np.uint8)), 336)
  assert max(width * height for width, height in sizes) < 1.1e7
