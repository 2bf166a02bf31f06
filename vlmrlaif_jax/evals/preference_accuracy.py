"""How often a reward model agrees with held-out preferences.

It is shown two answers and chooses: 1, 2, or 0 for a tie; None if what it said cannot
be read. Neither a tie nor an unread reply agrees with a preference, so guessing is
right in half of all pairs and silence in none.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Resampling

Choice: TypeAlias = Literal[0, 1, 2] | None


def choice_of_scores(scores: tuple[float, float] | None) -> Choice:
  """The answer that has the higher score."""
  if scores is None:
    return None
  first, second = scores
  return 0 if first == second else 1 if first > second else 2


def measure(
  choices: Sequence[Choice], better: Sequence[int], how: Resampling
) -> dict[str, Any]:
  """What a judge is worth: intervals by name, as dicts.

  "accuracy": share of the pairs that it agrees on. "tied", "unread": of those that it
  does not choose in. "slot_bias": by how much more often it chooses the first than the
  first is better, where it chooses; left out where it never does.
  """
  said = np.array(choices, float)  # NaN for None.
  shares = {
    "accuracy": said == np.asarray(better),
    "tied": said == 0,
    "unread": np.isnan(said),
  }
  found = {name: _interval(share, how) for name, share in shares.items()}
  chose = said > 0
  if chose.any():
    more = (said == 1).astype(float) - (np.asarray(better) == 1)
    groups = itertools.compress(how.groups or range(len(said)), chose)
    found["slot_bias"] = _interval(more[chose], how._replace(groups=list(groups)))
  return found


def differences(
  choices: Mapping[str, Sequence[Choice]],
  better: Sequence[int],
  how: Resampling,
  *,
  of: str,
) -> dict[str, Any]:
  """How much more accurate a judge is than each of the others, on the same pairs.

  Args:
    of: the judge's name.
  """
  right = {
    name: (np.array(each, float) == better).astype(float)
    for name, each in choices.items()
  }
  return {
    name: _interval(right[of] - right[name], how) for name in choices if name != of
  }


def _interval(values: np.ndarray, how: Resampling) -> dict[str, float]:
  return bootstrap.interval(values.astype(float), how)._asdict()
