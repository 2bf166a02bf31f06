import jax
import jax.numpy as jnp
import numpy as np

from tests.methods import roles
from vlmrlaif_jax.core.types import (
  Batch,
  Groups,
  continue_positions,
  flatten_groups,
  get_next_positions,
  group_rows,
)


def test_groups_in_rows_are_what_was_grouped():
  rows = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), roles.answered())
  groups = group_rows(rows, group=2, start=roles.START)
  assert groups.tokens.shape == (roles.ROWS, 2, roles.NEW)
  assert len(groups.prompts.video) == roles.ROWS
  jax.tree.map(np.testing.assert_array_equal, flatten_groups(groups), rows)


def rows_at(positions, mask):
  return Batch(None, None, mask, None, positions)


def test_text_continues_after_the_largest_position_of_a_real_token():
  positions = jnp.array([[[99, 0], [1, 5], [9, 2]], [[0, 0], [1, 1], [70, 80]]])
  mask = jnp.array([[False, True, True], [True, True, False]])
  text = jnp.array([[True, True, False], [True, True, True]])
  got = continue_positions(rows_at(positions, mask), text)
  np.testing.assert_array_equal(got[..., 0], [[10, 11, 0], [2, 3, 4]])
  np.testing.assert_array_equal(got[..., 1], got[..., 0])


def test_several_responses_continue_one_prompt():
  positions, mask = jnp.array([[[3], [7]], [[0], [4]]]), jnp.ones((2, 2), bool)
  got = continue_positions(rows_at(positions, mask), jnp.ones((2, 3, 2), bool))
  assert got.shape == (2, 3, 2, 1)
  np.testing.assert_array_equal(got[0, :, :, 0], [[8, 9]] * 3)
  np.testing.assert_array_equal(got[1, :, :, 0], [[5, 6]] * 3)


def test_text_after_an_empty_row_starts_at_0():
  nothing = rows_at(jnp.full((1, 2, 3), 5), jnp.zeros((1, 2), bool))
  assert get_next_positions(nothing).tolist() == [0]


def test_text_after_an_empty_response_continues_the_prompt():
  prompts = rows_at(jnp.array([[[3], [7]]]), jnp.ones((1, 2), bool))
  mask = jnp.array([[[True, True], [False, False]]])
  positions = continue_positions(prompts, mask)
  groups = Groups(prompts, None, mask, None, positions)
  assert get_next_positions(groups).tolist() == [[10, 8]]
