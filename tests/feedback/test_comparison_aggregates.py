"""Aggregates, held against results worked out by hand."""

import itertools

import numpy as np
import pytest

from vlmrlaif_jax.feedback import comparison_aggregates

NAN = float("nan")


def games(table):
  """own[i, j, 0] and own[j, i, 1] from {(i, j): (score of i, score of j)}."""
  count = 1 + max(itertools.chain(*table))
  own = np.full((count, count, 2), NAN)
  for (i, j), (first, second) in table.items():
    own[i, j, 0], own[j, i, 1] = first, second
  return own


def by_margins(rows):
  """i gets 5 + its margin over j / 2, beside j."""
  return games(
    {
      (i, j): (5 + rows[i][j] / 2, 5 - rows[i][j] / 2)
      for i, j in itertools.combinations(range(len(rows)), 2)
    }
  )


CLEAR = {(0, 1): (9, 6), (0, 2): (9, 3), (0, 3): (8, 1)}
CLEAR |= {(1, 2): (7, 4), (1, 3): (7, 2), (2, 3): (5, 3)}


@pytest.mark.parametrize("name", ["borda", "ranked_pairs", "irv"])
def test_a_clear_order_has_even_steps(name):
  found = comparison_aggregates.AGGREGATES[name](games(CLEAR))
  np.testing.assert_allclose(found, [10, 7, 4, 1])


def test_the_mean_is_of_what_was_read():
  table = {(0, 1): (9, 6), (1, 0): (4, 7), (0, 2): (2, 3)}
  np.testing.assert_allclose(comparison_aggregates.mean_scores(games(table)), [6, 5, 3])


def test_borda_counts_each_order_and_halves_ties():
  table = {(0, 1): (9, 6), (1, 0): (8, 7), (0, 2): (5, 5), (1, 2): (4, 2)}
  # Wins of 0: 1, 0, 1/2 of 3; of 1: 0, 1, 1 of 3; of 2: 1/2, 0 of 2.
  np.testing.assert_allclose(
    comparison_aggregates.borda_scores(games(table)), [5.5, 7, 3.25]
  )


def test_ranked_pairs_drops_the_weakest_win_of_a_circle():
  # 0 beats 1 by 6, 1 beats 2 by 4, 2 beats 0 by 2: the last does not hold.
  own = by_margins([[0, 6, -2], [0, 0, 4], [0, 0, 0]])
  np.testing.assert_allclose(
    comparison_aggregates.ranked_pairs_scores(own), [10, 5.5, 1]
  )


def test_ranked_pairs_is_level_in_a_circle_of_equals():
  own = by_margins([[0, 4, -4], [0, 0, 4], [0, 0, 0]])
  np.testing.assert_allclose(comparison_aggregates.ranked_pairs_scores(own), 5.5)


def test_a_circle_of_equals_does_not_outweigh_weaker_wins():
  # The circle 0, 1, 2 by 4 falls; that 1 beats 3, and 3 beats 0, by 2, holds.
  own = by_margins([[0, 4, -4, -2], [0, 0, 4, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(
    comparison_aggregates.ranked_pairs_scores(own), [2.5, 8.5, 5.5, 5.5]
  )


def test_instant_runoff_hands_on_the_votes_of_who_drops_out():
  # Votes for 0, 1, 2, 3:  1/2, 1/2, 2, 1. 0 is 2 behind the others, 1 is 1 ahead;
  # without 0:             -, 1, 2, 1.      1 is level with the others, 3 is 2 ahead;
  # without 1, 3 for 3:    -, -, 2, 2.      2 is 3 behind.
  own = by_margins([[0, -1, -2, 1], [0, 0, -1, 1], [0, 0, 0, -3], [0, 0, 0, 0]])
  np.testing.assert_allclose(comparison_aggregates.irv_scores(own), [1, 4, 7, 10])


def test_spectral_finds_the_strengths_that_shares_come_from():
  strengths = np.array([4, 3, 2, 1])
  pairs = itertools.combinations(range(4), 2)
  own = games({(i, j): (strengths[i], strengths[j]) for i, j in pairs})
  np.testing.assert_allclose(
    comparison_aggregates.spectral_scores(own), 1 + 9 * strengths / 10
  )


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", comparison_aggregates.AGGREGATES)
def test_an_aggregate_does_not_see_where_a_response_stands(name, missing):
  rng = np.random.default_rng(0)
  for _ in range(20):
    own = rng.integers(1, 11, (5, 5, 2)).astype(float)
    own[np.diag_indices(5)] = NAN
    if missing:  # 0 and 1 were not compared; nor were 2 and 3, in one order.
      own[[0, 1], [1, 0]] = NAN
      own[2, 3, 0] = own[3, 2, 1] = NAN
    order = rng.permutation(5)
    found = comparison_aggregates.AGGREGATES[name](own)
    moved = comparison_aggregates.AGGREGATES[name](own[np.ix_(order, order)])
    np.testing.assert_allclose(moved, found[order], rtol=1e-6)
    assert np.all((found >= 1) & (found <= 10))
