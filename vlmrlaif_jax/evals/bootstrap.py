"""Bootstrap intervals: how surely a measured mean, ratio or difference is known.

Percentile method (Efron and Tibshirani 1993, ch. 13). Items that share a group, such
as questions about one video, are drawn together (Davison and Hinkley 1997, 3.8):
else an interval would be too narrow. Without groups each item is drawn by itself.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.95  # Share of such intervals that contain the true value.


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

  def only(self, rows: Iterable[int]) -> "Resampling":
    """Returns the same for the items of these numbers."""
    if self.groups is None:
      return self
    return self._replace(groups=[self.groups[i] for i in rows])


def interval(values: Float[np.ndarray, " items"], how: Resampling) -> Interval:
  """Returns the mean of values."""
  return ratio_interval(values, np.ones_like(values), how)


def ratio_interval(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  how: Resampling,
) -> Interval:
  """Returns sum(numerators) / sum(denominators).

  Raises:
    ValueError: The denominators sum to 0, as those of no items do.
  """
  drawn, member = draw(len(numerators), how)
  values = ratios(numerators, denominators, drawn, member)
  whole = ratio(numerators, denominators)
  return summarise(whole, values, n=len(numerators))


def ratio_difference(
  numerators: Float[np.ndarray, " items"],
  denominators: Float[np.ndarray, " items"],
  other_numerators: Float[np.ndarray, " items"],
  other_denominators: Float[np.ndarray, " items"],
  how: Resampling,
) -> Interval:
  """Returns the first ratio minus the second; item i of both is the same question.

  Raises:
    ValueError: The denominators of a ratio sum to 0.
  """
  drawn, member = draw(len(numerators), how)
  values = ratios(numerators, denominators, drawn, member)
  others = ratios(other_numerators, other_denominators, drawn, member)
  change = ratio(numerators, denominators) - ratio(other_numerators, other_denominators)
  return summarise(change, values - others, n=len(numerators))


def correlation_interval(
  x: Float[np.ndarray, " items"], y: Float[np.ndarray, " items"], how: Resampling
) -> Interval:
  """Returns Pearson's correlation, cov(x, y) / (sd(x) sd(y)); both must vary."""
  drawn, member = draw(len(x), how)
  x, y = x - x.mean(), y - y.mean()
  items = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
  sums = np.stack([np.bincount(member, row, drawn.shape[1]) for row in items])
  values = _correlation(*sums[:, drawn].sum(axis=2))
  whole = float(_correlation(*items.sum(axis=1)))
  return summarise(whole, values, n=len(x))


def _correlation(n, x, y, xx, yy, xy):
  """From sums over n items; NaN where one of both is constant."""
  vary = (n * xx - x * x) * (n * yy - y * y)
  return (n * xy - x * y) / np.sqrt(np.where(vary > 1e-12, vary, np.nan))


def draw(
  items: int, how: Resampling
) -> tuple[Int[np.ndarray, "resamples groups"], Int[np.ndarray, " items"]]:
  """Returns (groups drawn with replacement per resample, group number per item)."""
  groups = how.groups or range(items)
  numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
  member = np.array([numbers[name] for name in groups], int)
  rng = np.random.default_rng(how.seed)
  return rng.integers(max(len(numbers), 1), size=(how.resamples, len(numbers))), member


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
  statistic: float, values: Float[np.ndarray, " resamples"], *, n: int
) -> Interval:
  """The statistic, and the quantiles of its resampled values."""
  tail = (1 - LEVEL) / 2
  low, high = np.nanquantile(values, [tail, 1 - tail])
  return Interval(statistic, float(low), float(high), n)
