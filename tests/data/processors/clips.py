"""Frames for tests of processors, and what their pixels are compared by."""

import numpy as np

from vlmrlaif_jax.data.processors.interface import process_frames
from vlmrlaif_jax.data.video import Frames


def make_frames(count, height, width):
  """Frames of noise on moving waves, between black and white."""
  rows, columns = np.indices((height, width))
  waves = [np.sin(rows / 9 + t) * np.cos(columns / (5 + t)) for t in range(count)]
  noise = np.random.default_rng(0).normal(0, 0.2, (count, height, width, 3))
  x = np.stack(waves)[..., None] * (1, -1, 0.5) + noise
  return np.clip(127.5 * (1 + x), 0, 255).astype(np.uint8)


def assert_pixels_close(got, want, std):
  """Asserts that 99 % of the values differ by at most 2 of 255, and none by 8.

  Args:
    got: Normalized pixels.
    want: Those of transformers.
    std: The standard deviation that they were divided by.
  """
  assert got.shape == want.shape
  error = np.abs(got - want) * 255 * std
  assert np.quantile(error, 0.99) <= 2 and error.max() <= 8


def process(processor, frames):
  """The pixels of frames that are resized as a decoder resizes them."""
  count = len(frames) if len(frames) > 1 else None  # One is an image.
  resized = np.stack([processor.resize(frame, count) for frame in frames])
  times = np.arange(len(frames)) / processor.fps
  processed, _ = process_frames(processor, Frames(resized, times, frames.shape[1:3]))
  return processed
