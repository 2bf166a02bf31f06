"""Packing of several short examples into one row.

`assign_first_fit` assigns examples to rows, `compute_packed_shape` finds one shape for
all steps, and `pack_rows` builds the arrays of a step.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlmrlaif_jax.core.types import PackedBatch
from vlmrlaif_jax.data import tokenization

RowLayout = list[list[int]]  # Indices of the examples in each row.


class PackedShape(NamedTuple):
  """The shape of a stage's packed batches, which is constant to compile once."""

  rows: int  # Rows of a batch.
  time: int  # Tokens of a row.
  videos: int  # Largest number of examples, and so of videos, in a row.


def assign_first_fit(lengths: Int[np.ndarray, " examples"], time: int) -> RowLayout:
  """Assigns examples to rows by first-fit decreasing (Johnson 1973).

  Args:
    lengths: Tokens of each example.
    time: Tokens of a row.
  """
  rows: RowLayout = []
  free: list[int] = []
  for number in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[number])
    row = next((i for i, left in enumerate(free) if left >= length), len(rows))
    if row == len(rows):
      rows.append([])
      free.append(time)
    rows[row].append(number)
    free[row] -= length
  return rows


def compute_packed_shape(
  steps: Iterable[Int[np.ndarray, "_"]],
  time: int,
  *,
  multiple: int,
  setting: str,
) -> PackedShape:
  """Returns the smallest shape that fits the examples of every step.

  Args:
    steps: Lengths in tokens of each step's examples.
    time: Tokens of a row.
    multiple: Divisor of the number of rows, for devices and microbatches.
    setting: Name of the setting of `time`, for the message of an error.

  Raises:
    ValueError: An example is longer than a row.
  """
  rows = videos = 1
  for lengths in steps:
    if max(lengths) > time:
      raise ValueError(
        f"{setting}={time} tokens are fewer than the {max(lengths)} of an example: "
        f"set --config.{setting} to at least that, or to 0 for one example per row"
      )
    layout = assign_first_fit(lengths, time)
    rows = max(rows, len(layout))
    videos = max(videos, *(len(row) for row in layout))
  return PackedShape(
    tokenization.round_up_length(rows, multiple=multiple), time, videos
  )


def pack_rows(
  rows: tokenization.TokenRows,
  layout: RowLayout,
  shape: PackedShape,
  video: Callable[[int], Float[np.ndarray, "frames patches channels"]],
  *,
  pad: int,
) -> PackedBatch:
  """Builds the packed batch of a step.

  Args:
    rows: Token rows of the examples, each of which becomes a segment.
    layout: Examples of each row. Rows beyond the layout are empty.
    shape: Shape of the batch.
    video: Returns the features of an example's video by the example's index.
    pad: Token id of padding.
  """
  tokens = np.full(shape[:2], pad, np.int32)
  segments = np.zeros(shape[:2], np.int32)
  loss_mask = np.zeros(shape[:2], bool)
  positions = np.zeros((*shape[:2], rows.positions.shape[2]), np.int32)
  first = video(0)
  videos = np.zeros((shape.rows, shape.videos, *first.shape), first.dtype)
  for row, numbers in enumerate(layout):
    at = segment = 0
    for place, number in enumerate(numbers):
      videos[row, place] = video(number)
      real = rows.mask[number]
      here = slice(at, at + int(real.sum()))
      at, segment = here.stop, segment + 1
      tokens[row, here] = rows.tokens[number][real]
      loss_mask[row, here] = rows.loss_mask[number][real]
      positions[row, here] = rows.positions[number][real]
      segments[row, here] = segment
  video_of = np.tile(np.arange(shape.videos, dtype=np.int32), (shape.rows, 1))
  return PackedBatch(videos, video_of, tokens, segments, loss_mask, positions)
