"""Curves of the report: (step, value) points made into what an SVG chart shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from vlmrlaif_jax.core.stage_log import format_number

Points: TypeAlias = Sequence[tuple[int, float | int]]

T = TypeVar("T")

# Of the chart, in its own pixels: the plot lies between SIDE and EDGE, TOP and BOTTOM.
SIDE, EDGE, TOP, BOTTOM = 38, 292, 8, 112
MAX_POINTS = 120  # Of a curve; a chart is about 250 pixels wide.
MANY = 30  # Points from which on the moving mean is drawn over the curve.


def draw_chart(
  title: str,
  lines: Mapping[str, Points],
  *,
  shared: bool = False,
  marks: Sequence[tuple[int, str]] = (),
) -> dict[str, Any]:
  """An SVG chart of one line, or of two that each have their own axis, left and right.

  Args:
    lines: the points of each line by its name, at least one point each.
    shared: whether all lines have one axis, on the left; then there may be many.
    marks: (step, what happened) to be marked across the lines.
  """
  steps = [step for points in lines.values() for step, _ in points]
  span = (min(steps), max(max(steps), min(steps) + 1))
  own = len(lines) > 1 and not shared
  edge = EDGE - SIDE if own else EDGE
  scale = get_axis_bounds([x for points in lines.values() for _, x in points])
  drawn = [
    draw_line(name, points, span, edge, None if own else scale)
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
      (round(get_x(step, span, edge), 1), f"step {step}: {said}")
      for step, said in marks
      if span[0] <= step <= span[1]
    ],
    "hover": "; ".join(describe_curve(name, points) for name, points in lines.items()),
  }


def get_x(step: float | int, span: tuple[int, int], edge: int) -> float:
  """How far right a step stands."""
  return SIDE + (step - span[0]) / (span[1] - span[0]) * (edge - SIDE)


def draw_line(
  name: str,
  points: Points,
  span: tuple[int, int],
  edge: int,
  scale: tuple[float, float] | None = None,
) -> dict[str, Any]:
  """One line: its SVG points, raw and smoothed, and the ticks of its axis.

  Args:
    scale: lowest and highest of the axis; None: the line's own.
  """
  low, high = scale or get_axis_bounds([x for _, x in points])
  up = lambda x: BOTTOM - (x - low) / (high - low) * (BOTTOM - TOP)
  draw = lambda line: " ".join(
    f"{get_x(t, span, edge):.1f},{up(x):.1f}"
    for t, x in select_evenly(line, MAX_POINTS)
  )
  smooth = smooth_points(points) if len(points) > MANY else points
  return {
    "name": name,
    "raw": draw(points) if len(points) > MANY else "",
    "smooth": draw(smooth),
    "ticks": [(round(up(x), 1), text) for x, text in choose_ticks(low, high)],
    "last": format_number(float(smooth[-1][1])),
  }


def describe_curve(name: str, points: Points) -> str:
  """The curve in words, for whoever hovers over it or cannot see it."""
  values = [float(x) for _, x in points]
  ends = f"from {format_number(values[0])} to {format_number(values[-1])}"
  return f"{name} {ends}, lowest {format_number(min(values))}, highest {format_number(max(values))}"


def get_axis_bounds(values: Sequence[float | int]) -> tuple[float, float]:
  """The range of the axis; never empty."""
  low, high = float(min(values)), float(max(values))
  room = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
  return low - room, high + room


def choose_ticks(low: float, high: float) -> list[tuple[float, str]]:
  """One to five round numbers in the range, and how they are written."""
  rough = (high - low) / 4
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= 0.999 * rough)
  digits = max(-math.floor(math.log10(step) + 1e-9), 0)
  write = format_number if digits > 4 else lambda x: f"{x:,.{digits}f}"
  first, last = math.ceil(low / step), math.floor(high / step)
  return [(i * step, write(float(i * step))) for i in range(first, last + 1)]


def smooth_points(points: Points) -> Points:
  """Each point's mean with its neighbours, a twelfth of the curve wide."""
  half = max(len(points) // 24, 1)
  windows = [points[max(i - half, 0) : i + half + 1] for i in range(len(points))]
  return [
    (step, sum(x for _, x in window) / len(window))
    for (step, _), window in zip(points, windows, strict=True)
  ]


def select_evenly(items: Sequence[T], most: int) -> list[T]:
  """At most `most` of the items, evenly spaced, the first and the last among them."""
  if len(items) <= most:
    return list(items)
  return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
