"""Curves: where a point lands, what an axis says."""

import pytest

from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.charts import (
  choose_ticks,
  draw_chart,
  select_evenly,
  smooth_points,
)


def points(text):
  return [tuple(float(x) for x in pair.split(",")) for pair in text.split()]


def test_line_spans_the_plot_from_first_to_last_step():
  (line,) = draw_chart("loss", {"loss": [(10, 1.0), (15, 3.0), (20, 2.0)]})["lines"]
  (left, low), (middle, high), (right, _) = points(line["smooth"])
  assert (left, middle, right) == (38, 165, 292)
  assert 8 < high < low < 112


def test_point_stands_level_with_its_tick():
  (line,) = draw_chart("x", {"x": [(0, 0.0), (1, 0.5), (2, 1.0)]})["lines"]
  heights = {text: y for y, text in line["ticks"]}
  assert [y for _, y in points(line["smooth"])] == pytest.approx(
    [heights["0.0"], heights["0.5"], heights["1.0"]], abs=0.11
  )


def test_constant_curve_has_an_axis():
  (line,) = draw_chart("x", {"x": [(0, 2.0), (1, 2.0)]})["lines"]
  assert len({y for _, y in points(line["smooth"])}) == 1
  assert "2.0" in [text for _, text in line["ticks"]]


def test_two_lines_have_their_own_axes():
  lines = draw_chart("x", {"a": [(0, 0), (4, 1)], "b": [(0, 50), (4, 90)]})["lines"]
  assert [line["name"] for line in lines] == ["a", "b"]
  assert lines[0]["smooth"] == lines[1]["smooth"]
  assert lines[0]["ticks"] != lines[1]["ticks"]


def test_long_curve_is_thinned_and_smoothed():
  (line,) = draw_chart("x", {"x": [(t, t % 2) for t in range(1000)]})["lines"]
  assert len(points(line["raw"])) == len(points(line["smooth"])) == 120
  assert line["last"] == "0.5"


@pytest.mark.parametrize(
  "low, high, texts",
  [
    (-0.05, 1.05, ["0.0", "0.5", "1.0"]),
    (2.301, 2.312, ["2.305", "2.310"]),
    (0.0, 40000.0, ["0", "10,000", "20,000", "30,000", "40,000"]),
    (0.0, 2e-5, ["0", "5e-06", "1e-05", "1.5e-05", "2e-05"]),
  ],
)
def test_ticks_are_round(low, high, texts):
  assert [text for _, text in choose_ticks(low, high)] == texts


def test_moving_mean_is_over_the_neighbours():
  rows = [(t, float(t == 5)) for t in range(10)]
  assert [x for _, x in smooth_points(rows)[3:8]] == [0, 1 / 3, 1 / 3, 1 / 3, 0]


def test_even_keeps_both_ends():
  assert select_evenly(list(range(101)), 5) == [0, 25, 50, 75, 100]


def test_only_finite_numbers_are_numbers():
  found = [is_number(x) for x in (1, 0.5, True, None, "1", float("nan"), float("inf"))]
  assert found == [True, True, False, False, False, False, False]


def test_lines_may_share_an_axis():
  lines = {"a": [(0, 0), (4, 1)], "b": [(0, 50), (4, 90)]}
  first, second = draw_chart("x", lines, shared=True)["lines"]
  assert first["ticks"] == second["ticks"]
  assert points(first["smooth"])[0][1] > points(second["smooth"])[0][1]


def test_marks_stand_at_their_steps_and_not_beyond_the_curve():
  made = draw_chart(
    "x", {"x": [(10, 1.0), (20, 2.0)]}, marks=[(15, "drift"), (21, "late")]
  )
  assert made["marks"] == [(165.0, "step 15: drift")]
