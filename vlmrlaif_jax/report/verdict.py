"""The result of a run in words and rows: which policy is better, and how surely."""

from collections.abc import Sequence

from vlmrlaif_jax.evals.summary import (
  PERCENT,
  PLAIN,
  POINTS,
  Row,
  format_interval,
  format_row,
  is_number,
  is_sure,
  largest_n,
)

BY_KIND = ".accuracy"  # After the kind of question.
LABELS = {
  "accuracy": "Correct answers",
  "hallucination": "Unsupported statements",
  "judge_score": "Judge's score",
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
  change = difference(results, "accuracy", before, after)
  points = format_interval(change, POINTS._replace(unit=" points"), sign="+")
  if not is_sure(change):
    return f"{sentence}: {points}, which may be chance."
  return f"{sentence}: {points}, {'better' if change['mean'] > 0 else 'worse'}."


def measures_of(runs: Sequence[Row]) -> list[str]:
  """Returns the measures that any policy has, in the order of the table.

  Args:
    runs: The results of each run, empty for one without any.
  """
  policies = [each for run in runs for each in run.get("policies", {}).values()]
  there = {name for each in policies for name in each}
  kinds = sorted(name for name in there if name.endswith(BY_KIND))
  measures = ["accuracy", *kinds, "hallucination", "judge_score"]
  return [name for name in measures if name in there]


def comparison_row(results: Row, measure: str, before: str, after: str) -> Row:
  """Returns each policy's value of a measure, the difference, and which is better."""
  form = PLAIN if measure == "judge_score" else PERCENT
  policies = results.get("policies", {})
  stats = {name: each.get(measure, {}) for name, each in policies.items()}
  change = difference(results, measure, before, after) if before != after else {}
  better = None
  if is_sure(change):
    more_is_better = measure != "hallucination"
    better = after if (change["mean"] > 0) == more_is_better else before
  return {
    "label": LABELS.get(measure, measure.removesuffix(BY_KIND).replace("_", " ")),
    "part": measure.endswith(BY_KIND),
    "n": largest_n(stats.values()),
    "stats": stats,
    "cells": format_row(stats, form),
    "difference": format_interval(change, form._replace(unit=""), sign="+"),
    "better": better,
    "fraction": form == PERCENT,
  }


def difference(results: Row, measure: str, before: str, after: str) -> Row:
  """Returns the measured difference, or that of the means, without an interval."""
  measured = results.get("difference", {}).get(measure)
  policies = results["policies"]
  both = (policies[name].get(measure, {}) for name in (before, after))
  return measured or mean_difference(*both)


def mean_difference(first: Row, second: Row) -> Row:
  """Returns the difference of two means, empty if there is none."""
  if not (is_number(first.get("mean")) and is_number(second.get("mean"))):
    return {}
  return {"mean": second["mean"] - first["mean"]}
