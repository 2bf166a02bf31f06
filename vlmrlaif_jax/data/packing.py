"""Rows that several short examples share: which stand where, and the arrays of them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlmrlaif_jax.core.types import PackedBatch
from vlmrlaif_jax.data import tokenization

RowLayout = list[list[int]]  # The numbers of the examples in each row.


class PackedShape(NamedTuple):
  """Of the arrays of every step, so that one program serves a whole stage."""

  rows: int
  time: int  # Tokens of a row.
  videos: int  # Of a row: one for each of its examples.


def assign_first_fit(lengths: Int[np.ndarray, " examples"], time: int) -> RowLayout:
  """The longest first, each in the first row that it fits in (Johnson 1973)."""
  rows: RowLayout = []
  room: list[int] = []
  for number in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[number])
    row = next((i for i, left in enumerate(room) if left >= length), len(rows))
    if row == len(rows):
      rows.append([])
      room.append(time)
    rows[row].append(number)
    room[row] -= length
  return rows


def compute_packed_shape(
  steps: Iterable[Int[np.ndarray, "_"]],
  time: int,
  *,
  multiple: int,
  setting: str,
) -> PackedShape:
  """What holds the examples of each of these steps.

  Args:
    steps: the lengths of each one's examples, in tokens.
    time: tokens of a row.
    multiple: of the number of rows: they are spread over devices and microbatches.
    setting: the name of the setting that `time` is of.

  Raises:
    ValueError: an example longer than a row.
  """
  rows = videos = 1
  for lengths in steps:
    if max(lengths) > time:
      raise ValueError(
        f"{setting}={time} tokens are fewer than the {max(lengths)} of an example: "
        f"give {setting} so many or more, or 0 for a row to each example"
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
  """The rows of a step.

  Args:
    rows: the token rows of the examples, each of which becomes a segment.
    layout: of as many rows as the shape or fewer; the others are empty.
    video: the features of an example's video, by its number.
    pad: the id where no token is.
  """
  tokens = np.full(shape[:2], pad, np.int32)
  segments = np.zeros(shape[:2], np.int32)
  loss_mask = np.zeros(shape[:2], bool)
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
      segments[row, here] = segment
  video_of = np.tile(np.arange(shape.videos, dtype=np.int32), (shape.rows, 1))
  return PackedBatch(videos, video_of, tokens, segments, loss_mask)
