"""Scores of a group from comparisons of its responses, two at a time.

Generative RLHF-V (2505.18531) takes the mean of what a response was given; the others
are those that it was measured against. They give coarse places, and serve RL worse.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

LOWEST, HIGHEST = 1.0, 10.0  # Scores of a judge.
# What two answers were given: own[i, j, o] is what i got beside j, where it stood first
# (o = 0) or second (o = 1); NaN if that was not asked, or not read.
Games: TypeAlias = Float[np.ndarray, "group group 2"]


def mean_scores(own: Games) -> Float[np.ndarray, " group"]:
  """The mean of what each was given; the paper's S, of both orders and all others.

  S(y_i) = 1 / (2 (k - 1)) sum_{j != i} [s(y_i | y_i, y_j) + s(y_i | y_j, y_i)]
  """
  return _mean(own, (1, 2))


def borda_scores(own: Games) -> Float[np.ndarray, " group"]:
  """The share of its comparisons that each wins; a tie is half a win."""
  other = _other(own)
  wins = np.where(np.isfinite(own), (own > other) + 0.5 * (own == other), np.nan)
  return _scaled(_mean(wins, (1, 2)))


def ranked_pairs_scores(own: Games) -> Float[np.ndarray, " group"]:
  """Places by Tideman's ranked pairs: the clearest wins hold, what contradicts falls.

  Wins of one strength are taken together, and those of them that close a circle fall
  together, so that the order of the responses makes no difference.
  """
  margins = _margins(own)
  held = np.zeros(margins.shape, bool)
  for strength in np.unique(margins[margins > 0])[::-1]:
    level = margins == strength
    held |= level & ~_reach(held | level).T
  return _by_place(_reach(held))


def irv_scores(own: Games) -> Float[np.ndarray, " group"]:
  """Places by instant runoff: by turns, the one that fewest put first drops out.

  The paper does not say who votes. Here each response does: it puts the others in the
  order of their margins beside it, and itself where it would be level. A vote is shared
  among equals. Of those who have the fewest, the least ahead of who is left drops out.
  """
  margins = _margins(own)
  np.fill_diagonal(margins, 0.0)
  ballots = np.nan_to_num(margins, nan=-np.inf)
  left, turns = np.ones(len(own), bool), np.zeros(len(own), int)
  while left.any():
    standing = np.where(left[:, None], ballots, -np.inf)
    first = np.isfinite(standing) & (standing == standing.max(axis=0))
    votes = np.sum(first / np.maximum(first.sum(axis=0), 1), axis=1)
    fewest = left & (votes < votes[left].min() + 1e-6)  # Thirds are not exact.
    ahead = np.nansum(margins[:, left], axis=1)
    turns[left] += 1
    left &= ~(fewest & (ahead < ahead[fewest].min() + 1e-6))
  return _by_place(turns[:, None] > turns)


def spectral_scores(own: Games) -> Float[np.ndarray, " group"]:
  """The long run of a walk that goes from i to j by j's share of their points.

  Rank Centrality (1209.1688) with shares of points for shares of wins: none is 0.
  """
  other = _other(own)
  steps = np.nan_to_num(_mean(other / (own + other), 2)) / (len(own) - 1)
  steps += np.diag(1 - steps.sum(axis=1))
  # A power rather than an eigenvector: also where not all are linked by comparisons.
  run = np.linalg.matrix_power(steps, 2**20)
  return _scaled(run.mean(axis=0))


# All are from 1 to 10, so above what is incomplete.
AGGREGATES: dict[str, Callable[[Games], Float[np.ndarray, " group"]]] = {
  "mean": mean_scores,
  "borda": borda_scores,
  "ranked_pairs": ranked_pairs_scores,
  "irv": irv_scores,
  "spectral": spectral_scores,
}


def _mean(x: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
  """The mean of what is not NaN; NaN if all is."""
  count = np.sum(np.isfinite(x), axis=axis)
  return np.nansum(x, axis=axis) / np.where(count, count, np.nan)


def _other(own: Games) -> Games:
  """What j got where i got own[i, j, o]."""
  return own.transpose(1, 0, 2)[..., ::-1]


def _margins(own: Games) -> Float[np.ndarray, "group group"]:
  """By how much i is above j, over both orders; rounded, so that equals are equal."""
  return np.round(_mean(own - _other(own), 2), 9)


def _reach(beats: Bool[np.ndarray, "group group"]) -> Bool[np.ndarray, "group group"]:
  """Whether a chain of wins leads from i to j."""
  chain = beats.copy()
  for k in range(len(chain)):
    chain |= np.outer(chain[:, k], chain[k])
  return chain


def _by_place(above: Bool[np.ndarray, "group group"]) -> Float[np.ndarray, " group"]:
  """From the lowest score to the highest in even steps; equals share theirs."""
  lead = above.sum(axis=1) - above.sum(axis=0)
  return _scaled((1 + lead / (len(above) - 1)) / 2)


def _scaled(share: np.ndarray) -> np.ndarray:
  """From 0..1 to the range of scores."""
  return LOWEST + (HIGHEST - LOWEST) * share
