"""Formats the verdict and the tables of policies, benchmarks, judges and labels."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from vlmrlaif_jax.core.files import find_differences
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.evals.summary import (
  FRACTION,
  HELD_OUT,
  PERCENT,
  PLAIN,
  POINTS,
  find_largest_n,
  format_interval,
  format_row,
  has_interval,
  is_number,
  is_sure,
)
from vlmrlaif_jax.report.files import Workdir, read_json_or_empty, read_stage_facts

KIND_SUFFIXES = (".accuracy", ".f1")  # Of measures of one kind of question.
MEASURES = {  # Labels of the measures of held-out questions.
  "mean_of_kinds": "Mean over kinds",
  "accuracy": "Correct answers",
  "hallucination": "Unsupported statements",
  "judge_score": "Judge's score",
}
SETS = {  # Titles of the sets of pairs that judges are compared on.
  "labels": "held-out pairs with the judge's labels",
  "truth": "pairs of answers to the benchmark with true labels",
  "shifted": "pairs of answers about another world with true labels",
}
OUTCOME_LABELS = {
  "kept": "kept",
  "tie": "tie",
  "order_inconsistent": "changed with the order of the answers",
  "unparsable": "unreadable reply",
}
COUNT_LABELS = {
  "identical": "pairs of equal answers, not judged",
  "empty": "pairs with an empty answer, not judged",
  "too_long": "pairs that are too long, not judged",
  "truth_pairs": "kept pairs with a better answer by truth",
}
RATE_LABELS = (  # Rates that the page shows in sentences.
  *("asked", "claims", "first_chosen", "claims_denied", "truth_agreement"),
  *("chosen_words", "rejected_words"),
)


# Held-out questions.


def format_verdict(run: Workdir) -> str:
  """Returns the result in words."""
  if not run.results:
    return "No verdict yet: the evaluation has not finished."
  before, after = run.pair
  policies = run.results["policies"]
  measure = next(name for name in MEASURES if name in policies[after])
  values = [
    f"{name.upper()} {format_interval(policies[name][measure], PERCENT)}"
    for name in dict.fromkeys([after, before])
  ]
  sentence = f"{MEASURES[measure]}, held-out questions: {', '.join(values)}."
  if before == after:
    return f"{sentence} There is no other policy to compare."
  change = get_difference(run, measure)
  points = format_interval(change, POINTS._replace(unit=" points"), sign="+")
  if not is_sure(change):
    return f"{sentence} Difference: {points}, which may be chance."
  rank = "better" if change["mean"] > 0 else "worse"
  return f"{sentence} Difference: {points}, {rank}."


def compare_all_policies(runs: Mapping[str, Workdir]) -> list[dict[str, JsonRow]]:
  """Returns a row for each measure of any policy, with the cells of each run."""
  measures = {
    name
    for run in runs.values()
    for policy in run.results.get("policies", {}).values()
    for name in policy
  }
  kinds = sorted(name for name in measures if name.endswith(KIND_SUFFIXES))
  whole = [name for name in MEASURES if name in measures]
  return [
    {name: make_comparison_row(run, measure) for name, run in runs.items()}
    for measure in (*whole[:1], *kinds, *whole[1:])
  ]


def make_comparison_row(run: Workdir, measure: str) -> JsonRow:
  """Returns each policy's value of a measure, the difference and the better policy."""
  before, after = run.pair
  form = PLAIN if measure == "judge_score" else PERCENT
  policies = run.results.get("policies", {})
  stats = {name: each.get(measure, {}) for name, each in policies.items()}
  difference = get_difference(run, measure) if before != after else {}
  better = None
  if is_sure(difference):
    more_is_better = measure != "hallucination"
    better = after if (difference["mean"] > 0) == more_is_better else before
  return {
    "label": MEASURES.get(measure, measure.split(".")[0].replace("_", " ")),
    "part": measure.endswith(KIND_SUFFIXES),
    "n": find_largest_n(stats.values()),
    "stats": stats,
    "cells": format_row(stats, form),
    "difference": format_interval(difference, form._replace(unit=""), sign="+"),
    "better": better,
    "fraction": form == PERCENT,
  }


def get_difference(run: Workdir, measure: str) -> JsonRow:
  """Returns the measured difference, or that of the means without an interval."""
  measured = run.results.get("difference", {}).get(measure)
  stats = (run.results["policies"][name].get(measure, {}) for name in run.pair)
  return measured or compute_mean_difference(*stats)


def compute_mean_difference(first: JsonRow, second: JsonRow) -> JsonRow:
  """Returns the difference of two means, {} if one is missing."""
  if not (is_number(first.get("mean")) and is_number(second.get("mean"))):
    return {}
  return {"mean": second["mean"] - first["mean"]}


# Benchmarks, judges and labels.


def collect_benchmarks(runs: Mapping[str, Workdir]) -> list[JsonRow]:
  """Returns a table for each benchmark: a row per measure, a column per policy.

  Args:
    runs: Workdirs by name; columns start with the name unless it is "".
  """
  scores: dict[str, dict[str, JsonRow]] = {}
  for run, (root, stages, *_) in runs.items():
    paths = [path for name in stages for path in (root / name).glob("*/*/scores.json")]
    for path in sorted(paths, key=lambda path: (path.parent.name != "sft", path)):
      if path.parts[-3] == HELD_OUT:
        continue  # The results have their own table.
      benchmark, policy, _ = path.parts[-3:]
      column = " · ".join(filter(None, (run, policy.upper())))
      scores.setdefault(benchmark, {})[column] = read_json_or_empty(path)
  return [
    {"name": name, **make_benchmark_table(scores[name])} for name in sorted(scores)
  ]


def make_benchmark_table(scores: dict[str, JsonRow]) -> JsonRow:
  """Returns a benchmark's measures, and the settings that differ between columns."""
  measures = dict.fromkeys(name for each in scores.values() for name in each["scores"])
  rows = []
  for name in measures:
    stats = [each["scores"].get(name, {}) for each in scores.values()]
    first, last = stats[0], stats[-1]
    rows.append(
      {
        "measure": name.replace("_", " ").replace(".", ": "),
        "cells": [format_interval(stat, FRACTION) for stat in stats],
        "difference": format_interval(
          compute_mean_difference(first, last), FRACTION, sign="+", missing=""
        ),
        "apart": has_interval(first)
        and has_interval(last)
        and (first["high"] < last["low"] or last["high"] < first["low"]),
        "n": find_largest_n(stats),
      }
    )
  return {
    "columns": list(scores),
    "rows": rows,
    "faults": [
      f"{column}: {count} {name}"
      for column, each in scores.items()
      for name, count in each.get("counts", {}).items()
      if count and name != "cases"
    ],
    "differs": find_differences(*(each.get("recipe", {}) for each in scores.values())),
  }


def collect_judges(stage: Path) -> list[JsonRow]:
  """Returns a table for each set of pairs on which a stage compared judges."""
  tables = []
  for name, results in read_json_or_empty(stage / "results.json").items():
    if isinstance(results, dict) and "judges" in results:
      judges = results["judges"]
      measures = list(dict.fromkeys(m for stats in judges.values() for m in stats))
      rows = {
        judge: [format_interval(stats.get(m) or {}, PERCENT) for m in measures]
        for judge, stats in judges.items()
      }
      title = f"{results.get('pairs', 0):,} {SETS.get(name, name)}"
      tables.append({"title": title, "measures": measures, "rows": rows})
  return tables


def collect_label_rates(root: Path, stages: Iterable[str]) -> list[JsonRow]:
  """Returns the rates of each stage that judged pairs or claims.

  Returns:
    A table per stage, in order: the rates of its rates.json, the number of pairs or
    answers with each outcome, and the other counts by label.
  """
  tables = []
  for name in stages:
    rates = read_json_or_empty(root / name / "rates.json")
    outcomes = {key: label for key, label in OUTCOME_LABELS.items() if key in rates}
    if "claims" in rates:
      answers = [key for key in rates if key.startswith("answers_")]
      outcomes = {
        key: key.removeprefix("answers_").replace("_", " ") for key in answers
      }
    elif "asked" not in rates:
      continue
    others = {
      COUNT_LABELS.get(key, key.replace("_", " ")): value
      for key, value in rates.items()
      if value is not None and key not in (*RATE_LABELS, *outcomes)
    }
    tables.append(
      {
        "title": read_stage_facts(root, name).title,
        "rates": rates,
        "outcomes": {label: rates[key] for key, label in outcomes.items()},
        "others": others,
      }
    )
  return tables
