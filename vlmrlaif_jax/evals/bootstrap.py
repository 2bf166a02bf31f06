"""Bootstrap intervals: how surely a measured mean, ratio or difference is known.

Percentile method (Efron and Tibshirani 1993, ch. 13). Items that share a group, such
as questions about one video, are drawn together (Davison and Hinkley 1997, 3.8):
else an interval would be too narrow. Without groups each item is drawn by itself.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Interval(NamedTuple):
  """A statistic, and what it is likely to lie between."""

  mean: float
  low: float
  high: float
  n: int  # Items it was measured on.


def interval(
  values: Float[np.ndarray, " items"],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
  groups: Sequence[Hashable] | None = None,
) -> Interval:
  """The mean of values.

  Args:
    level: share of such intervals that hold the true mean.
    groups: which group each item is of.
  """
  ones = np.ones_like(values)
  return ratio_interval(
    values, ones, seed=seed, resamples=resamples, level=level, groups=groups
  )


def ratio_interval(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
  groups: Sequence[Hashable] | None = None,
) -> Interval:
  """sum(numerators) / sum(denominators).

  Raises:
    ValueError: the denominators sum to 0, as those of no items do.
  """
  drawn, groups = draw(len(numerators), groups, resamples, seed)
  values = ratios(numerators, denominators, drawn, groups)
  return summarise(
    ratio(numerators, denominators), values, level=level, n=len(numerators)
  )


def ratio_difference(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  other_numerators: Float[np.ndarray, " items"],
  other_denominators: Float[np.ndarray, " items"],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
  groups: Sequence[Hashable] | None = None,
) -> Interval:
  """The first ratio minus the second, item i of both being the same question.

  Raises:
    ValueError: the denominators of a ratio sum to 0.
  """
  drawn, groups = draw(len(numerators), groups, resamples, seed)
  values = ratios(numerators, denominators, drawn, groups)
  others = ratios(other_numerators, other_denominators, drawn, groups)
  change = ratio(numerators, denominators) - ratio(other_numerators, other_denominators)
  return summarise(change, values - others, level=level, n=len(numerators))


def correlation_interval(
  x: Float[np.ndarray, " items"],
  y: Float[np.ndarray, " items"],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
  groups: Sequence[Hashable] | None = None,
) -> Interval:
  """Pearson's correlation: cov(x, y) / (sd(x) sd(y)), both of which vary."""
  drawn, member = draw(len(x), groups, resamples, seed)
  x, y = x - x.mean(), y - y.mean()
  items = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
  sums = np.stack([np.bincount(member, row, drawn.shape[1]) for row in items])
  values = _correlation(*sums[:, drawn].sum(axis=2))
  whole = float(_correlation(*items.sum(axis=1)))
  return summarise(whole, values, level=level, n=len(x))


def _correlation(n, x, y, xx, yy, xy):
  """From sums over n items; NaN where one of both is constant."""
  vary = (n * xx - x * x) * (n * yy - y * y)
  return (n * xy - x * y) / np.sqrt(np.where(vary > 1e-12, vary, np.nan))


def draw(
  items: int, groups: Sequence[Hashable] | None, resamples: int, seed: int
) -> tuple[Int[np.ndarray, "resamples groups"], Int[np.ndarray, " items"]]:
  """(groups drawn with replacement for each resample, group number of each item)."""
  numbers = {name: i for i, name in enumerate(dict.fromkeys(groups or range(items)))}
  member = np.array([numbers[name] for name in groups or range(items)], int)
  rng = np.random.default_rng(seed)
  return rng.integers(max(len(numbers), 1), size=(resamples, len(numbers))), member


def ratio(
  numerators: Float[np.ndarray, " items"], denominators: Float[np.ndarray, " items"]
) -> float:
  """sum(numerators) / sum(denominators)."""
  if not denominators.sum():
    raise ValueError(
      f"the denominators of {len(denominators)} items sum to 0: nothing was measured"
    )
  return float(numerators.sum() / denominators.sum())


def ratios(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  drawn: Int[np.ndarray, "resamples groups"],
  member: Int[np.ndarray, " items"],
) -> Float[np.ndarray, " resamples"]:
  """The ratio in each resample; NaN where its denominators sum to 0."""
  total = lambda x: np.bincount(member, x, minlength=drawn.shape[1])[drawn].sum(axis=1)
  above, below = total(numerators), total(denominators)
  return np.divide(above, below, out=np.full(len(drawn), np.nan), where=below != 0)


def summarise(
  statistic: float, values: Float[np.ndarray, " resamples"], *, level: float, n: int
) -> Interval:
  """The statistic, and the quantiles of its resampled values."""
  tail = (1 - level) / 2
  low, high = np.nanquantile(values, [tail, 1 - tail])
  return Interval(statistic, float(low), float(high), n)
