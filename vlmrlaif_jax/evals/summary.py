"""Compares the measured results of two policies in words and signs."""

import math
from typing import Any, TypeAlias


def is_number(x: object) -> bool:
  """A finite number; True and None are not."""
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


Row: TypeAlias = dict[str, Any]


Measure: TypeAlias = tuple[str, ...]  # Keys that lead to a statistic of a policy.


def compared(policies: Row) -> tuple[str, str]:
  """The two policies to compare: SFT and PPO, or else the first and the last.

  The best of n answers of a policy, "dpo@16", is no policy.
  """
  names = [name for name in policies if "@" not in name]
  if {"sft", "ppo"} <= set(names):
    return "sft", "ppo"
  return names[0], names[-1]


def at(policy: Row, measure: Measure) -> Row:
  """The statistic at a path of keys; empty where there is none."""
  for key in measure:
    policy = policy.get(key) or {}
  return policy


def is_sure(change: Row) -> bool:
  """Whether the 95 % interval leaves out zero."""
  if not (is_number(change.get("low")) and is_number(change.get("high"))):
    return False
  return change["low"] > 0 or change["high"] < 0


def say(stat: Row, scale: int, unit: str, *, sign: str = "") -> str:
  """A mean and its interval: 78.1 % [75.4, 80.7]."""
  if not is_number(stat.get("mean")):
    return "not measured"
  form = sign + (".1f" if scale == 100 else ".2f")
  text = f"{stat['mean'] * scale:{form}}{unit}"
  if is_number(stat.get("low")) and is_number(stat.get("high")):
    text += f" [{stat['low'] * scale:{form}}, {stat['high'] * scale:{form}}]"
  return text.replace("-", "−")
