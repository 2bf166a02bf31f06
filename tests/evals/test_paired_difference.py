"""Two results, case by case."""

import pytest

from vlmrlaif_jax.evals import paired_difference
from vlmrlaif_jax.evals.bootstrap import Resampling

HOW = Resampling()


def case(id, value, weight=None, video=None):
  row = {"id": id, "video": f"/x/{video or id}.mp4", "values": {"m": value}}
  return row | ({} if weight is None else {"weights": {"m": weight}})


def test_difference_is_over_the_cases_that_both_have():
  before = [case("a", 1.0), case("b", 0.0), {"id": "c", "video": "", "values": {}}]
  after = [case("b", 0.5), case("c", 9.0), case("a", 2.0), case("d", 9.0)]
  found = paired_difference.difference(before, after, "m", HOW)
  assert (found.mean, found.n) == (0.75, 2)
  assert (found.low, found.high) == (0.5, 1.0)


def test_difference_of_ratios_is_of_their_sums():
  before, after = (
    [case("a", 1.0, 1), case("b", 0.0, 3)],
    [case("a", 0.5, 2), case("b", 0.0, 0)],
  )
  assert paired_difference.difference(before, after, "m", HOW).mean == 1 / 2 - 1 / 4


def test_cases_of_a_video_are_drawn_together():
  before = [case(str(i), 0.0, video=str(i // 2)) for i in range(4)]
  after = [case(str(i), float(i % 2), video=str(i // 2)) for i in range(4)]
  found = paired_difference.difference(before, after, "m", HOW)
  assert (found.low, found.high) == (0.5, 0.5)


@pytest.mark.parametrize("after", [[], [case("b", 1.0)], [case("a", 1.0, 0)]])
def test_nothing_in_common_has_no_difference(after):
  assert paired_difference.difference([case("a", 1.0)], after, "m", HOW) is None
