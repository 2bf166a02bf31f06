"""Computes bootstrap intervals of means, ratios, differences and correlations.

Uses the percentile method (Efron and Tibshirani 1993, ch. 13). Items that share a
group, such as questions about one video, are resampled together (Davison and Hinkley
1997, 3.8). Otherwise intervals would be too narrow. Without groups every item is
resampled by itself.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

LEVEL = 0.95  # Confidence level: share of the intervals that contain the true value.
# A row of rows.jsonl: "id", "video", "values" by measure, and "weights" by measure if
# they are not 1.
CaseRow: TypeAlias = Mapping[str, Any]


class Interval(NamedTuple):
  """A statistic with its confidence interval."""

  mean: float
  low: float
  high: float
  n: int  # Number of items.


class Resampling(NamedTuple):
  """Settings of a bootstrap."""

  # Group of each item, such as its video. None resamples each item by itself.
  groups: Sequence[Hashable] | None = None
  seed: int = 0
  resamples: int = 2000  # Number of bootstrap samples.


def compute_mean_interval(
  values: Float[np.ndarray, " items"], resampling: Resampling
) -> Interval:
  """Returns the mean of values with its interval."""
  return compute_ratio_interval(values, np.ones_like(values), resampling)


def compute_ratio_interval(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  resampling: Resampling,
) -> Interval:
  """Returns sum(numerators) / sum(denominators) with its interval.

  Raises:
    ValueError: The denominators sum to 0, for example because there are no items.
  """
  _check_measured(denominators)
  return _resample(_divide, (numerators, denominators), resampling)


def compute_ratio_difference(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  other_numerators: Float[np.ndarray, " items"],
  other_denominators: Float[np.ndarray, " items"],
  resampling: Resampling,
) -> Interval:
  """Returns the first ratio minus the second; item i of both is the same question.

  Raises:
    ValueError: The denominators of either ratio sum to 0.
  """
  _check_measured(denominators, other_denominators)
  items = (numerators, denominators, other_numerators, other_denominators)
  subtract = lambda a, b, c, d: _divide(a, b) - _divide(c, d)
  return _resample(subtract, items, resampling)


def compute_paired_difference(
  before: Sequence[CaseRow],
  after: Sequence[CaseRow],
  measure: str,
  resampling: Resampling,
) -> Interval | None:
  """Returns a measure's mean after minus before, over the cases that both results have.

  Args:
    before: Cases of the first result.
    after: Cases of the second result.
    measure: Name of the measure.
    resampling: Settings of the bootstrap. Cases of one video are resampled together,
      whatever its groups are.

  Returns:
    The difference, or None if no such case has a weight above 0.
  """
  sides = [{row["id"]: row for row in rows} for rows in (before, after)]
  has = lambda side, id: id in side and measure in side[id]["values"]
  ids = [id for id in sides[0] if all(has(side, id) for side in sides)]
  weigh = lambda row: row.get("weights", {}).get(measure, 1.0)
  take = lambda side, get: np.array([get(side[id]) for id in ids], float)
  base_weights, weights = (take(side, weigh) for side in sides)
  if not base_weights.sum() or not weights.sum():
    return None
  old, new = (take(side, lambda row: row["values"][measure]) for side in sides)
  resampling = resampling._replace(groups=[sides[0][id]["video"] for id in ids])
  return compute_ratio_difference(
    new * weights, weights, old * base_weights, base_weights, resampling
  )


def compute_correlation_interval(
  x: Float[np.ndarray, " items"], y: Float[np.ndarray, " items"], resampling: Resampling
) -> Interval:
  """Returns Pearson's correlation, cov(x, y) / (sd(x) sd(y)); both must vary."""
  x, y = x - x.mean(), y - y.mean()
  items = (np.ones_like(x), x, y, x * x, y * y, x * y)
  return _resample(_correlate, items, resampling)


# Statistics of sums over items. A sum is a number, or an array with one per resample.


def _divide(numerator, denominator):
  """Returns the quotient, NaN where the denominator is 0."""
  return np.divide(
    numerator,
    denominator,
    out=np.full(np.shape(denominator), np.nan),
    where=denominator != 0,
  )


def _correlate(n, x, y, xx, yy, xy):
  """Returns the correlation, NaN where x or y is constant."""
  variances = (n * xx - x * x) * (n * yy - y * y)
  return (n * xy - x * y) / np.sqrt(np.where(variances > 1e-12, variances, np.nan))


def _check_measured(*denominators: Float[np.ndarray, " items"]) -> None:
  for each in denominators:
    if not each.sum():
      raise ValueError(
        f"the denominators of {len(each)} items sum to 0: the ratio is undefined"
      )


def _resample(
  statistic: Callable[..., Any],
  items: Sequence[Float[np.ndarray, " items"]],
  resampling: Resampling,
) -> Interval:
  """Returns a statistic of sums over items, with quantiles of its resampled values."""
  groups = resampling.groups or range(len(items[0]))
  numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
  member = np.array([numbers[name] for name in groups], int)
  rng = np.random.default_rng(resampling.seed)
  samples = rng.integers(len(numbers), size=(resampling.resamples, len(numbers)))
  sums = [np.bincount(member, x, len(numbers))[samples].sum(axis=1) for x in items]
  tail = (1 - LEVEL) / 2
  low, high = np.nanquantile(statistic(*sums), [tail, 1 - tail])
  estimate = float(statistic(*(x.sum() for x in items)))
  return Interval(estimate, float(low), float(high), len(items[0]))
