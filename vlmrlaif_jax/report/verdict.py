"""The result of a run in words and rows: which policy is better, and how surely."""

from collections.abc import Sequence

from vlmrlaif_jax.evals.summary import (
  PERCENT,
  PLAIN,
  POINTS,
  Measure,
  Row,
  at,
  format_interval,
  format_row,
  is_number,
  is_sure,
  largest_n,
)

LABELS: dict[Measure, str] = {
  ("accuracy",): "Correct answers",
  ("hallucination",): "Unsupported statements",
  ("judge_score",): "Judge's score",
}


def verdict(results: Row, before: str, after: str) -> str:
  """Returns the result in one sentence."""
  if not results:
    return "No verdict yet: the evaluation has not finished."
  claims = [
    f"{name.upper()} {format_interval(results['policies'][name]['accuracy'], PERCENT)}"
    for name in dict.fromkeys([after, before])
  ]
  sentence = " against ".join(claims) + " correct on held-out truth"
  if before == after:
    return sentence + "; there is no other policy to compare it with."
  change = difference(results, ("accuracy",), before, after)
  points = format_interval(change, POINTS._replace(unit=" points"), sign="+")
  if not is_sure(change):
    return f"{sentence}: {points}, which may be chance."
  return f"{sentence}: {points}, {'better' if change['mean'] > 0 else 'worse'}."


def measures_of(runs: Sequence[Row]) -> list[Measure]:
  """Returns the measures that any policy has, in the order of the table.

  Args:
    runs: The results of each run, empty for one without any.
  """
  policies = [each for run in runs for each in run.get("policies", {}).values()]
  kinds = dict.fromkeys(kind for each in policies for kind in each.get("by_kind", {}))
  measures = [("accuracy",), *(("by_kind", kind) for kind in kinds)]
  measures += [("hallucination",), ("judge_score",)]
  return [name for name in measures if any(at(each, name) for each in policies)]


def comparison_row(results: Row, measure: Measure, before: str, after: str) -> Row:
  """Returns each policy's value of a measure, the difference, and which is better."""
  form = PLAIN if measure == ("judge_score",) else PERCENT
  policies = results.get("policies", {})
  stats = {name: at(each, measure) for name, each in policies.items()}
  change = difference(results, measure, before, after) if before != after else {}
  better = None
  if is_sure(change):
    more_is_better = measure != ("hallucination",)
    better = after if (change["mean"] > 0) == more_is_better else before
  return {
    "label": LABELS.get(measure, measure[-1].replace("_", " ")),
    "part": measure[0] == "by_kind",
    "n": largest_n(stats.values()),
    "stats": stats,
    "cells": format_row(stats, form),
    "difference": format_interval(change, form._replace(unit=""), sign="+"),
    "better": better,
    "fraction": form == PERCENT,
  }


def difference(results: Row, measure: Measure, before: str, after: str) -> Row:
  """Returns the measured difference, or that of the means, without an interval."""
  measured = at(results.get("difference") or {}, measure)
  policies = results["policies"]
  means = mean_difference(at(policies[before], measure), at(policies[after], measure))
  return measured or means


def mean_difference(first: Row, second: Row) -> Row:
  """Returns the difference of two means, empty if there is none."""
  if not (is_number(first.get("mean")) and is_number(second.get("mean"))):
    return {}
  return {"mean": second["mean"] - first["mean"]}
