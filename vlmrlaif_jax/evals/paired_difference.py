"""Two results of a benchmark, case by case."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Interval, Resampling

# As in rows.jsonl: "id", "video", "values" and, of those that weigh other than 1,
# "weights", each by measure.
Case: TypeAlias = Mapping[str, Any]


def difference(
  before: Sequence[Case], after: Sequence[Case], measure: str, how: Resampling
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
  how = how._replace(groups=[sides[0][id]["video"] for id in both])
  return bootstrap.ratio_difference(new * below, below, old * base, base, how)
