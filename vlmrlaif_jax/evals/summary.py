"""Formats means with confidence intervals, alone and in rows of tables.

A statistic is a mapping with "mean" and, if they are known, "low", "high" and "n".
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeGuard

from vlmrlaif_jax.core.jsonl import JsonRow

HELD_OUT = "held_out"  # Name of the benchmark of the run's held-out questions.


class NumberFormat(NamedTuple):
  """The format of a statistic."""

  scale: int = 1  # Factor from the statistic to the number that is shown.
  digits: int = 2  # Digits after the decimal point.
  unit: str = ""  # Text after the mean.
  counted: bool = False  # Adds " of N" after the interval.


PLAIN = NumberFormat()
PERCENT = NumberFormat(100, 1, " %")
POINTS = NumberFormat(100, 1)
FRACTION = NumberFormat(1, 3)


class TableLine(NamedTuple):
  """A measure with a row in a table."""

  label: str
  measure: str
  format: NumberFormat


def is_number(x: object) -> TypeGuard[float | int]:
  """Returns whether x is a finite number; True and None are not."""
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def select_comparable(policies: Iterable[str]) -> tuple[str, str]:
  """Returns the two policies to compare: SFT and PPO, or else the first and the last.

  Best-of-n results such as "dpo@16" are not policies.
  """
  names = [name for name in policies if "@" not in name]
  if {"sft", "ppo"} <= set(names):
    return "sft", "ppo"
  return names[0], names[-1]


def has_interval(stat: JsonRow) -> bool:
  """Returns whether a statistic has both ends of its interval."""
  return is_number(stat.get("low")) and is_number(stat.get("high"))


def is_sure(change: JsonRow) -> bool:
  """Returns whether the 95 % interval of a difference excludes zero."""
  return has_interval(change) and (change["low"] > 0 or change["high"] < 0)


def find_largest_n(stats: Iterable[JsonRow]) -> int:
  """Returns the largest number of items of any statistic."""
  return max((stat.get("n", 0) for stat in stats), default=0)


def format_interval(
  stat: JsonRow,
  form: NumberFormat = PLAIN,
  *,
  sign: str = "",
  missing: str = "not measured",
) -> str:
  """Formats a mean and its interval: 78.1 % [75.4, 80.7] of 1,090.

  Args:
    stat: The statistic.
    form: The format.
    sign: "+" adds a sign to positive numbers.
    missing: The text for a statistic without a mean.
  """
  if not is_number(stat.get("mean")):
    return missing
  number = lambda key: f"{stat[key] * form.scale:{sign}.{form.digits}f}"
  text = f"{number('mean')}{form.unit}"
  if has_interval(stat):
    text += f" [{number('low')}, {number('high')}]"
  text = text.replace("-", "−")
  return f"{text} of {stat['n']:,}" if form.counted else text


def format_row(
  stats: Mapping[str, JsonRow], form: NumberFormat, *, signed: str = "difference"
) -> dict[str, str]:
  """Formats the statistics of a row of a table.

  Args:
    stats: The statistic in each column.
    form: The format.
    signed: Column of signed numbers without a unit.
  """
  change = form._replace(unit="")
  return {
    name: format_interval(stat, change, sign="+")
    if name == signed
    else format_interval(stat, form)
    for name, stat in stats.items()
  }


def make_measure_rows(
  lines: Iterable[TableLine],
  columns: Mapping[str, JsonRow],
  *,
  signed: str = "difference",
) -> list[dict[str, str]]:
  """Returns a row for each measure, with the columns "measure" and those of `columns`.

  Args:
    lines: The measures.
    columns: Statistics by measure, for each column: a policy or a difference.
    signed: Column of signed numbers.
  """
  return [
    {"measure": line.label}
    | format_row(
      {name: stats.get(line.measure, {}) for name, stats in columns.items()},
      line.format,
      signed=signed,
    )
    for line in lines
  ]


def format_seeds(values: Sequence[float | int]) -> str:
  """Formats the mean over seeds and each seed's value: 62.5 (75.0, 50.0)."""
  each = ", ".join(f"{value:.1f}" for value in values)
  return f"{statistics.mean(values):.1f} ({each})" if len(values) > 1 else each
