"""Intervals against scipy's, and against what they promise: to hold the truth."""

import numpy as np
import pytest
import scipy.stats

from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Resampling

MANY = 20_000  # Resamples; two such intervals differ by about 1 % of their width.
rng = np.random.default_rng(0)
VALUES, OTHERS = rng.normal(0.3, 1, 90), rng.normal(0, 1, 90)
ABOVE, BELOW = rng.poisson(2, 90).astype(float), 2.0 + rng.poisson(5, 90)
OTHER_ABOVE, OTHER_BELOW = rng.poisson(3, 90).astype(float), 2.0 + rng.poisson(4, 90)


def scipy_bounds(samples, statistic):
  found = scipy.stats.bootstrap(
    samples, statistic, paired=True, n_resamples=MANY, method="percentile",
    rng=np.random.default_rng(7), batch=2000,
  ).confidence_interval  # fmt: skip
  return [found.low, found.high]


def over(above, below, axis):
  return above.sum(axis=axis) / below.sum(axis=axis)


def test_interval_is_scipys():
  ours = bootstrap.compute_mean_interval(VALUES, Resampling(resamples=MANY))
  theirs = scipy_bounds((VALUES,), np.mean)
  np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.006)
  assert (ours.mean, ours.n) == (pytest.approx(VALUES.mean(), abs=1e-12), 90)


def test_ratio_interval_is_scipys():
  ours = bootstrap.compute_ratio_interval(ABOVE, BELOW, Resampling(resamples=MANY))
  theirs = scipy_bounds((ABOVE, BELOW), over)
  np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.0015)
  assert ours.mean == pytest.approx(ABOVE.sum() / BELOW.sum(), abs=1e-12)


def test_ratio_difference_is_scipys():
  four = (ABOVE, BELOW, OTHER_ABOVE, OTHER_BELOW)
  ours = bootstrap.compute_ratio_difference(*four, Resampling(resamples=MANY))
  apart = lambda a, b, c, d, axis: over(a, b, axis) - over(c, d, axis)
  theirs = scipy_bounds(four, apart)
  np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.003)


def test_correlation_interval_is_scipys():
  ours = bootstrap.compute_correlation_interval(
    ABOVE, BELOW, Resampling(resamples=MANY)
  )
  theirs = scipy_bounds(
    (ABOVE, BELOW), lambda x, y, axis: scipy.stats.pearsonr(x, y, axis=axis).statistic
  )
  np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.01)
  assert ours.mean == pytest.approx(
    scipy.stats.pearsonr(ABOVE, BELOW).statistic, abs=1e-12
  )


def test_groups_are_drawn_whole():
  """Three items of one value in each group: the interval of one item a group."""
  names = [f"v{i}" for i in range(90) for _ in range(3)]
  grouped = bootstrap.compute_mean_interval(np.repeat(VALUES, 3), Resampling(names, 3))
  single = bootstrap.compute_mean_interval(VALUES, Resampling(seed=3))
  np.testing.assert_allclose(grouped[:3], single[:3], rtol=1e-12)
  assert grouped.n == 270


def test_groups_of_one_change_nothing():
  names = [f"v{i}" for i in range(90)]
  alone, grouped = Resampling(seed=3), Resampling(names, seed=3)
  assert bootstrap.compute_mean_interval(
    VALUES, grouped
  ) == bootstrap.compute_mean_interval(VALUES, alone)


def covered(throw, truth, **settings):
  """In what share of 300 trials the interval holds the truth."""
  thrown = [throw(np.random.default_rng(i)) for i in range(300)]
  found = [
    bootstrap.compute_mean_interval(
      values, Resampling(seed=i, resamples=300, **settings)
    )
    for i, values in enumerate(thrown)
  ]
  return np.mean([x.low <= truth <= x.high for x in found])


def test_nineteen_of_twenty_intervals_hold_a_coins_truth():
  coin = lambda rng: (rng.random(150) < 0.6).astype(float)
  assert 0.92 <= covered(coin, 0.6) <= 0.975


def test_only_groups_see_that_questions_about_a_video_are_alike():
  names = [f"v{i}" for i in range(60) for _ in range(5)]
  coin = lambda rng: np.repeat(rng.random(60) < 0.6, 5).astype(float)
  assert covered(coin, 0.6) < 0.75
  assert covered(coin, 0.6, groups=names) >= 0.91


def test_difference_from_oneself_is_exactly_zero():
  same = bootstrap.compute_ratio_difference(ABOVE, BELOW, ABOVE, BELOW, Resampling())
  assert same == (0.0, 0.0, 0.0, 90)


def test_pairing_narrows_a_difference():
  close = VALUES + 0.01 * OTHERS
  paired = bootstrap.compute_mean_interval(close - VALUES, Resampling())
  assert paired.high - paired.low < 0.01


def test_resample_without_anything_to_count_is_left_out():
  """Of two items one has no claims; a quarter of the resamples draws it twice."""
  found = bootstrap.compute_ratio_interval(
    np.array([1.0, 0.0]), np.array([4.0, 0.0]), Resampling(resamples=100)
  )
  assert found == (0.25, 0.25, 0.25, 2)


@pytest.mark.parametrize("items", [0, 3])
def test_nothing_measured_is_an_error(items):
  with pytest.raises(ValueError, match=f"of {items} items sum to 0"):
    bootstrap.compute_ratio_interval(np.zeros(items), np.zeros(items), Resampling())


def test_seed_settles_the_interval():
  first, again, other = (
    bootstrap.compute_mean_interval(VALUES, Resampling(seed=seed)) for seed in (1, 1, 2)
  )
  assert first == again != other


# Two results, case by case.


def case(id, value, weight=None, video=None):
  row = {"id": id, "video": f"/x/{video or id}.mp4", "values": {"m": value}}
  return row | ({} if weight is None else {"weights": {"m": weight}})


def test_difference_is_over_the_cases_that_both_have():
  before = [case("a", 1.0), case("b", 0.0), {"id": "c", "video": "", "values": {}}]
  after = [case("b", 0.5), case("c", 9.0), case("a", 2.0), case("d", 9.0)]
  found = bootstrap.compute_paired_difference(before, after, "m", Resampling())
  assert (found.mean, found.n) == (0.75, 2)
  assert (found.low, found.high) == (0.5, 1.0)


def test_difference_of_ratios_is_of_their_sums():
  before, after = (
    [case("a", 1.0, 1), case("b", 0.0, 3)],
    [case("a", 0.5, 2), case("b", 0.0, 0)],
  )
  assert (
    bootstrap.compute_paired_difference(before, after, "m", Resampling()).mean
    == 1 / 2 - 1 / 4
  )


def test_cases_of_a_video_are_drawn_together():
  before = [case(str(i), 0.0, video=str(i // 2)) for i in range(4)]
  after = [case(str(i), float(i % 2), video=str(i // 2)) for i in range(4)]
  found = bootstrap.compute_paired_difference(before, after, "m", Resampling())
  assert (found.low, found.high) == (0.5, 0.5)


@pytest.mark.parametrize("after", [[], [case("b", 1.0)], [case("a", 1.0, 0)]])
def test_nothing_in_common_has_no_difference(after):
  assert (
    bootstrap.compute_paired_difference([case("a", 1.0)], after, "m", Resampling())
    is None
  )
