"""Computes SVG charts from curves of (step, value) points."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from vlmrlaif_jax.core.stage_log import format_number

Points: TypeAlias = Sequence[tuple[int, float | int]]

_T = TypeVar("_T")

# Edges of the plot in the chart's pixels: left, right, top and bottom.
SIDE, EDGE, TOP, BOTTOM = 38, 292, 8, 112
MAX_POINTS = 120  # Points of a drawn curve; a chart is about 250 pixels wide.
SMOOTHING_THRESHOLD = 30  # Longer curves get a moving mean.


def draw_chart(
  title: str,
  lines: Mapping[str, Points],
  *,
  shared: bool = False,
  marks: Sequence[tuple[int, str]] = (),
) -> dict[str, Any]:
  """Returns an SVG chart of one or more curves.

  Args:
    title: Title of the chart.
    lines: Points of each curve by its name, at least one point each.
    shared: Uses one axis for all curves. Otherwise there may be two curves, each with
      its own axis.
    marks: (step, text) of each mark across the curves.
  """
  steps = [step for points in lines.values() for step, _ in points]
  span = (min(steps), max(max(steps), min(steps) + 1))
  has_two_axes = len(lines) > 1 and not shared
  edge = EDGE - SIDE if has_two_axes else EDGE
  scale = get_axis_bounds([x for points in lines.values() for _, x in points])
  drawn = [
    draw_line(name, points, span, edge, None if has_two_axes else scale)
    for name, points in lines.items()
  ]
  if len(lines) > 1:
    drawn = [line | {"raw": ""} for line in drawn]
  return {
    "title": title,
    "lines": drawn,
    "shared": shared,
    "edge": edge,
    "steps": [(SIDE, min(steps)), (edge, max(steps))],
    "marks": [
      (round(get_x(step, span, edge), 1), f"step {step}: {text}")
      for step, text in marks
      if span[0] <= step <= span[1]
    ],
    "hover": "; ".join(describe_curve(name, points) for name, points in lines.items()),
  }


def get_x(step: float | int, span: tuple[int, int], edge: int) -> float:
  """Returns the horizontal position of a step in pixels."""
  return SIDE + (step - span[0]) / (span[1] - span[0]) * (edge - SIDE)


def draw_line(
  name: str,
  points: Points,
  span: tuple[int, int],
  edge: int,
  scale: tuple[float, float] | None = None,
) -> dict[str, Any]:
  """Returns a curve's SVG points, raw and smoothed, and the ticks of its axis.

  Args:
    name: Name of the curve.
    points: Points of the curve.
    span: First and last step of the chart.
    edge: Right edge of the plot in pixels.
    scale: Lowest and highest value of the axis, None to fit the curve.
  """
  low, high = scale or get_axis_bounds([x for _, x in points])
  get_y = lambda x: BOTTOM - (x - low) / (high - low) * (BOTTOM - TOP)
  draw = lambda line: " ".join(
    f"{get_x(t, span, edge):.1f},{get_y(x):.1f}"
    for t, x in select_evenly(line, MAX_POINTS)
  )
  smooth = smooth_points(points) if len(points) > SMOOTHING_THRESHOLD else points
  return {
    "name": name,
    "raw": draw(points) if len(points) > SMOOTHING_THRESHOLD else "",
    "smooth": draw(smooth),
    "ticks": [(round(get_y(x), 1), text) for x, text in choose_ticks(low, high)],
    "last": format_number(float(smooth[-1][1])),
  }


def describe_curve(name: str, points: Points) -> str:
  """Describes a curve in words, for a tooltip and for screen readers."""
  values = [float(x) for _, x in points]
  ends = f"from {format_number(values[0])} to {format_number(values[-1])}"
  low, high = format_number(min(values)), format_number(max(values))
  return f"{name} {ends}, lowest {low}, highest {high}"


def get_axis_bounds(values: Sequence[float | int]) -> tuple[float, float]:
  """Returns the lowest and highest value of the axis, which always differ."""
  low, high = float(min(values)), float(max(values))
  margin = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
  return low - margin, high + margin


def choose_ticks(low: float, high: float) -> list[tuple[float, str]]:
  """Returns one to five round numbers within the axis, with their texts."""
  rough = (high - low) / 4
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= 0.999 * rough)
  digits = max(-math.floor(math.log10(step) + 1e-9), 0)
  write = format_number if digits > 4 else lambda x: f"{x:,.{digits}f}"
  first, last = math.ceil(low / step), math.floor(high / step)
  return [(i * step, write(float(i * step))) for i in range(first, last + 1)]


def smooth_points(points: Points) -> Points:
  """Returns the moving mean over a twelfth of the curve."""
  half = max(len(points) // 24, 1)
  windows = [points[max(i - half, 0) : i + half + 1] for i in range(len(points))]
  return [
    (step, sum(x for _, x in window) / len(window))
    for (step, _), window in zip(points, windows, strict=True)
  ]


def select_evenly(items: Sequence[_T], limit: int) -> list[_T]:
  """Returns at most `limit` items, evenly spaced, including the first and the last."""
  if len(items) <= limit:
    return list(items)
  return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
