"""Bootstrap intervals: how surely a measured mean, ratio or difference is known.

Percentile method (Efron and Tibshirani 1993, ch. 13). Items that share a group, such
as questions about one video, are drawn together (Davison and Hinkley 1997, 3.8):
else an interval would be too narrow. Without groups each item is drawn by itself.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

LEVEL = 0.95  # Share of such intervals that contain the true value.
# As in rows.jsonl: "id", "video", "values" and, of those that weigh other than 1,
# "weights", each by measure.
CaseRow: TypeAlias = Mapping[str, Any]


class Interval(NamedTuple):
  """A statistic, and what it is likely to lie between."""

  mean: float
  low: float
  high: float
  n: int  # Items it was measured on.


class Resampling(NamedTuple):
  """How the samples of a bootstrap are drawn."""

  # The group of each item, such as its video. None draws each item by itself.
  groups: Sequence[Hashable] | None = None
  seed: int = 0
  resamples: int = 2000


def compute_mean_interval(values: Float[np.ndarray, " items"], resampling: Resampling) -> Interval:
  """Returns the mean of values."""
  return compute_ratio_interval(values, np.ones_like(values), resampling)


def compute_ratio_interval(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  resampling: Resampling,
) -> Interval:
  """Returns sum(numerators) / sum(denominators).

  Raises:
    ValueError: The denominators sum to 0, as those of no items do.
  """
  _check_measured(denominators)
  return _resampled(_ratio, (numerators, denominators), resampling)


def compute_ratio_difference(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  other_numerators: Float[np.ndarray, " items"],
  other_denominators: Float[np.ndarray, " items"],
  resampling: Resampling,
) -> Interval:
  """Returns the first ratio minus the second; item i of both is the same question.

  Raises:
    ValueError: The denominators of a ratio sum to 0.
  """
  _check_measured(denominators, other_denominators)
  items = (numerators, denominators, other_numerators, other_denominators)
  return _resampled(lambda a, b, c, d: _ratio(a, b) - _ratio(c, d), items, resampling)


def compute_paired_difference(
  before: Sequence[CaseRow], after: Sequence[CaseRow], measure: str, resampling: Resampling
) -> Interval | None:
  """Returns by how much a measure is higher after, over the cases that both have.

  Questions about one video are drawn together.

  Args:
    before: cases of the first result.
    after: cases of the second.
    measure: the measure's name.
    how: the bootstrap; its groups are the videos of `before`.

  Returns:
    The difference; None where there is no such case, or none that weighs anything.
  """
  sides = [{row["id"]: row for row in rows} for rows in (before, after)]
  has = lambda side, id: id in side and measure in side[id]["values"]
  both = [id for id in sides[0] if all(has(side, id) for side in sides)]
  weigh = lambda row: row.get("weights", {}).get(measure, 1.0)
  take = lambda side, of: np.array([of(side[id]) for id in both], float)
  base, below = (take(side, weigh) for side in sides)
  if not base.sum() or not below.sum():
    return None
  old, new = (take(side, lambda row: row["values"][measure]) for side in sides)
  resampling = resampling._replace(groups=[sides[0][id]["video"] for id in both])
  return compute_ratio_difference(new * below, below, old * base, base, resampling)


def compute_correlation_interval(
  x: Float[np.ndarray, " items"], y: Float[np.ndarray, " items"], resampling: Resampling
) -> Interval:
  """Returns Pearson's correlation, cov(x, y) / (sd(x) sd(y)); both must vary."""
  x, y = x - x.mean(), y - y.mean()
  return _resampled(_correlation, (np.ones_like(x), x, y, x * x, y * y, x * y), resampling)


# Statistics, from sums over items. The sums are numbers, or have one for each resample.


def _ratio(above, below):
  """NaN where the sum below is 0."""
  return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below != 0)


def _correlation(n, x, y, xx, yy, xy):
  """NaN where x or y is constant."""
  vary = (n * xx - x * x) * (n * yy - y * y)
  return (n * xy - x * y) / np.sqrt(np.where(vary > 1e-12, vary, np.nan))


def _check_measured(*denominators: Float[np.ndarray, " items"]) -> None:
  for each in denominators:
    if not each.sum():
      raise ValueError(
        f"the denominators of {len(each)} items sum to 0: nothing was measured"
      )


def _resampled(
  statistic: Callable[..., Any],
  items: Sequence[Float[np.ndarray, " items"]],
  resampling: Resampling,
) -> Interval:
  """Returns a statistic of sums over items, with quantiles of its resampled values."""
  groups = resampling.groups or range(len(items[0]))
  numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
  member = np.array([numbers[name] for name in groups], int)
  rng = np.random.default_rng(resampling.seed)
  drawn = rng.integers(len(numbers), size=(resampling.resamples, len(numbers)))
  sums = [np.bincount(member, x, len(numbers))[drawn].sum(axis=1) for x in items]
  tail = (1 - LEVEL) / 2
  low, high = np.nanquantile(statistic(*sums), [tail, 1 - tail])
  whole = float(statistic(*(x.sum() for x in items)))
  return Interval(whole, float(low), float(high), len(items[0]))
