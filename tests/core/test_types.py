import jax
import numpy as np

from tests.methods import roles
from vlmrlaif_jax.core.types import flatten_groups, group_rows


def test_groups_in_rows_are_what_was_grouped():
  rows = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), roles.answered())
  groups = group_rows(rows, group=2, start=roles.START)
  assert groups.tokens.shape == (roles.ROWS, 2, roles.NEW)
  assert len(groups.prompts.video) == roles.ROWS
  jax.tree.map(np.testing.assert_array_equal, flatten_groups(groups), rows)
