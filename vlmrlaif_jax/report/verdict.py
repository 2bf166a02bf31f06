"""The result of a run in words and rows: which policy is better, and how surely."""

from typing import Any, TypeAlias

from vlmrlaif_jax.report_charts import is_number

Row: TypeAlias = dict[str, Any]
Measure: TypeAlias = tuple[str, ...]  # Keys that lead to a statistic of a policy.

LABELS = {
  ("accuracy",): "Correct answers",
  ("hallucination",): "Unsupported statements",
  ("judge_score",): "Judge's score",
}


def compared(policies: Row) -> tuple[str, str]:
  """The two policies to compare: SFT and PPO, or else the first and the last.

  The best of n answers of a policy, "dpo@16", is no policy.
  """
  names = [name for name in policies if "@" not in name]
  if {"sft", "ppo"} <= set(names):
    return "sft", "ppo"
  return names[0], names[-1]


def verdict(results: Row, before: str, after: str) -> str:
  """The result in one sentence."""
  if not results:
    return "No verdict yet: the evaluation has not finished."
  claims = [
    f"{name.upper()} {say(results['policies'][name]['accuracy'], 100, ' %')}"
    for name in dict.fromkeys([after, before])
  ]
  sentence = " against ".join(claims) + " correct on held-out truth"
  if before == after:
    return sentence + "; there is no other policy to compare it with."
  change = difference(results, ("accuracy",), before, after)
  points = say(change, 100, " points", sign="+")
  if not is_sure(change):
    return f"{sentence}: {points}, which may be chance."
  return f"{sentence}: {points}, {'better' if change['mean'] > 0 else 'worse'}."


def comparison(results: Row, before: str, after: str) -> list[Row]:
  """The rows of the result table."""
  policies = results["policies"].values()
  kinds = dict.fromkeys(kind for each in policies for kind in each.get("by_kind", {}))
  measures = [("accuracy",), *(("by_kind", kind) for kind in kinds)]
  measures += [("hallucination",), ("judge_score",)]
  return [
    comparison_row(results, measure, before, after)
    for measure in measures
    if any(at(each, measure) for each in policies)
  ]


def comparison_row(results: Row, measure: Measure, before: str, after: str) -> Row:
  """One measure: each policy's value, the difference, and which is surely better."""
  scale, unit = (1, "") if measure == ("judge_score",) else (100, " %")
  stats = {name: at(each, measure) for name, each in results["policies"].items()}
  change = difference(results, measure, before, after) if before != after else {}
  better = None
  if is_sure(change):
    more_is_better = measure != ("hallucination",)
    better = after if (change["mean"] > 0) == more_is_better else before
  return {
    "label": LABELS.get(measure, measure[-1]),
    "part": measure[0] == "by_kind",
    "n": max(stat.get("n", 0) for stat in stats.values()),
    "stats": stats,
    "cells": {name: say(stat, scale, unit) for name, stat in stats.items()},
    "difference": say(change, scale, "", sign="+"),
    "better": better,
    "fraction": scale == 100,
  }


def at(policy: Row, measure: Measure) -> Row:
  """The statistic at a path of keys; empty where there is none."""
  for key in measure:
    policy = policy.get(key) or {}
  return policy


def difference(results: Row, measure: Measure, before: str, after: str) -> Row:
  """As the evaluation measured it; else of the means, and then without an interval."""
  measured = at(results.get("difference") or {}, measure)
  if measured:
    return measured
  first, second = (at(results["policies"][name], measure) for name in (before, after))
  if not (is_number(first.get("mean")) and is_number(second.get("mean"))):
    return {}
  return {"mean": second["mean"] - first["mean"]}


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
