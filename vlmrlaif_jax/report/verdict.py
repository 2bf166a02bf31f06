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
  """The result in one sentence."""
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


def comparison(results: Row, before: str, after: str) -> list[Row]:
  """The rows of the result table."""
  policies = list(results["policies"].values())
  return [
    comparison_row(results, measure, before, after) for measure in measures_of(policies)
  ]


def measures_of(policies: Sequence[Row]) -> list[Measure]:
  """Returns the measures that any of the policies has, in the order of the table."""
  kinds = dict.fromkeys(kind for each in policies for kind in each.get("by_kind", {}))
  measures = [("accuracy",), *(("by_kind", kind) for kind in kinds)]
  measures += [("hallucination",), ("judge_score",)]
  return [name for name in measures if any(at(each, name) for each in policies)]


def comparison_row(results: Row, measure: Measure, before: str, after: str) -> Row:
  """One measure: each policy's value, the difference, and which is surely better."""
  form = PLAIN if measure == ("judge_score",) else PERCENT
  stats = {name: at(each, measure) for name, each in results["policies"].items()}
  change = difference(results, measure, before, after) if before != after else {}
  better = None
  if is_sure(change):
    more_is_better = measure != ("hallucination",)
    better = after if (change["mean"] > 0) == more_is_better else before
  return {
    "label": LABELS.get(measure, measure[-1]),
    "part": measure[0] == "by_kind",
    "n": largest_n(stats.values()),
    "stats": stats,
    "cells": format_row(stats, form),
    "difference": format_interval(change, form._replace(unit=""), sign="+"),
    "better": better,
    "fraction": form == PERCENT,
  }


def difference(results: Row, measure: Measure, before: str, after: str) -> Row:
  """As the evaluation measured it; else of the means, and then without an interval."""
  measured = at(results.get("difference") or {}, measure)
  if measured:
    return measured
  first, second = (at(results["policies"][name], measure) for name in (before, after))
  if not (is_number(first.get("mean")) and is_number(second.get("mean"))):
    return {}
  return {"mean": second["mean"] - first["mean"]}
