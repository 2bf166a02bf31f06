"""Packed rows: which example stands where, and what the arrays then hold."""

import numpy as np
import pytest

from tests.helpers.rows import text_positions
from vlmrlaif_jax.data import packing
from vlmrlaif_jax.data.tokenization import TokenRows

PAD = 9


def rows(*lists):
  """Rows of six tokens, the first of them padding; negative ones are learned."""
  tokens = np.array([[PAD] * (6 - len(row)) + list(map(abs, row)) for row in lists])
  learn = [[False] * (6 - len(row)) + [t < 0 for t in row] for row in lists]
  mask = tokens != PAD
  return TokenRows(tokens, mask, np.array(learn), text_positions(mask))


def video(number):
  return np.full((1, 2, 1), number + 1.0, np.float16)


def test_the_longest_goes_first_into_the_first_row_with_room():
  assert packing.assign_first_fit(np.array([3, 6, 5, 4, 2]), 10) == [[1, 3], [2, 0, 4]]


def test_what_fills_a_row_leaves_no_room():
  assert packing.assign_first_fit(np.array([5, 5, 5]), 10) == [[0, 1], [2]]


def test_shape_is_of_the_fullest_step_and_its_rows_are_of_a_multiple():
  steps = [np.array([6, 6, 6]), np.array([2, 2, 2, 2])]
  shape = packing.compute_packed_shape(steps, 10, multiple=2, setting="sft.pack_len")
  assert shape == packing.PackedShape(rows=4, time=10, videos=4)


def test_an_example_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match="sft.pack_len=5 tokens are fewer than the 6"):
    packing.compute_packed_shape(
      [np.array([2, 6])], 5, multiple=1, setting="sft.pack_len"
    )


def test_rows_hold_examples_one_behind_the_other():
  given = rows([1, 2, -3], [4, -5], [6, 7, 8, -9 + 1])
  shape = packing.PackedShape(rows=3, time=6, videos=2)
  packed = packing.pack_rows(given, [[2, 1], [0]], shape, video, pad=PAD)
  want = [[6, 7, 8, 8, 4, 5], [1, 2, 3, PAD, PAD, PAD], [PAD] * 6]
  np.testing.assert_array_equal(packed.tokens, want)
  want = [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0], [0] * 6]
  np.testing.assert_array_equal(packed.segments, want)
  want = [[0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [0] * 6]
  np.testing.assert_array_equal(packed.loss_mask, want)
  want = [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0], [0] * 6]
  np.testing.assert_array_equal(packed.positions[..., 0], want)
  np.testing.assert_array_equal(packed.video[..., 0, 0, 0], [[3, 2], [1, 0], [0, 0]])
  np.testing.assert_array_equal(packed.video_of, [[0, 1]] * 3)


def test_tokens_close_up_where_padding_stood_among_them():
  tokens = np.array([[1, PAD, 2]])
  mask, positions = tokens != PAD, np.array([[[3, 5], [0, 0], [7, 6]]])
  given = TokenRows(tokens, mask, tokens == 2, positions)
  shape = packing.PackedShape(rows=1, time=3, videos=1)
  packed = packing.pack_rows(given, [[0]], shape, video, pad=PAD)
  np.testing.assert_array_equal(packed.tokens, [[1, 2, PAD]])
  np.testing.assert_array_equal(packed.loss_mask, [[False, True, False]])
  np.testing.assert_array_equal(packed.positions, [[[3, 5], [7, 6], [0, 0]]])
