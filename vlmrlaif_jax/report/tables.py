"""The result of a run in words, and tables of policies, benchmarks, judges, labels."""

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

BY_KIND = ".accuracy"  # After the kind of question.
MEASURES = {  # Of held-out questions, by label.
  "accuracy": "Correct answers",
  "hallucination": "Unsupported statements",
  "judge_score": "Judge's score",
}
SETS = {
  "labels": "held-out pairs, as they were labelled",
  "truth": "pairs of answers to the benchmark, as truth has them",
  "shifted": "pairs of answers about another world, as truth has them",
}
OUTCOME_LABELS = {
  "kept": "kept",
  "tie": "tie",
  "order_inconsistent": "changed with the order",
  "unparsable": "not understood",
}
COUNT_LABELS = {
  "identical": "pairs alike, and not judged",
  "empty": "with an empty answer, and not judged",
  "too_long": "too long, and not judged",
  "truth_pairs": "kept pairs that truth tells apart",
}
RATE_LABELS = (  # Rates that the page has a sentence for.
  *("asked", "claims", "first_chosen", "claims_denied", "truth_agreement"),
  *("chosen_words", "rejected_words"),
)


# Of held-out questions.


def format_verdict(run: Workdir) -> str:
  """Returns the result in one sentence."""
  if not run.results:
    return "No verdict yet: the evaluation has not finished."
  before, after = run.pair
  policies = run.results["policies"]
  claims = [
    f"{name.upper()} {format_interval(policies[name]['accuracy'], PERCENT)}"
    for name in dict.fromkeys([after, before])
  ]
  sentence = " against ".join(claims) + " correct on held-out truth"
  if before == after:
    return sentence + "; there is no other policy to compare it with."
  change = get_difference(run, "accuracy")
  points = format_interval(change, POINTS._replace(unit=" points"), sign="+")
  if not is_sure(change):
    return f"{sentence}: {points}, which may be chance."
  return f"{sentence}: {points}, {'better' if change['mean'] > 0 else 'worse'}."


def compare_all_policies(runs: Mapping[str, Workdir]) -> list[dict[str, JsonRow]]:
  """Returns a row for each measure that any policy has, with the cells of each run."""
  there = {
    name
    for run in runs.values()
    for policy in run.results.get("policies", {}).values()
    for name in policy
  }
  kinds = sorted(name for name in there if name.endswith(BY_KIND))
  first, *others = MEASURES
  return [
    {name: make_comparison_row(run, measure) for name, run in runs.items()}
    for measure in (first, *kinds, *others)
    if measure in there
  ]


def make_comparison_row(run: Workdir, measure: str) -> JsonRow:
  """Returns each policy's value of a measure, the difference, and which is better."""
  before, after = run.pair
  form = PLAIN if measure == "judge_score" else PERCENT
  policies = run.results.get("policies", {})
  stats = {name: each.get(measure, {}) for name, each in policies.items()}
  change = get_difference(run, measure) if before != after else {}
  better = None
  if is_sure(change):
    more_is_better = measure != "hallucination"
    better = after if (change["mean"] > 0) == more_is_better else before
  return {
    "label": MEASURES.get(measure, measure.removesuffix(BY_KIND).replace("_", " ")),
    "part": measure.endswith(BY_KIND),
    "n": find_largest_n(stats.values()),
    "stats": stats,
    "cells": format_row(stats, form),
    "difference": format_interval(change, form._replace(unit=""), sign="+"),
    "better": better,
    "fraction": form == PERCENT,
  }


def get_difference(run: Workdir, measure: str) -> JsonRow:
  """Returns the measured difference, or that of the means, without an interval."""
  measured = run.results.get("difference", {}).get(measure)
  both = (run.results["policies"][name].get(measure, {}) for name in run.pair)
  return measured or compute_mean_difference(*both)


def compute_mean_difference(first: JsonRow, second: JsonRow) -> JsonRow:
  """Returns the difference of two means, empty if there is none."""
  if not (is_number(first.get("mean")) and is_number(second.get("mean"))):
    return {}
  return {"mean": second["mean"] - first["mean"]}


# Of benchmarks, judges and labels.


def collect_benchmarks(runs: Mapping[str, Workdir]) -> list[JsonRow]:
  """Returns a table for each benchmark: a row a measure, a column a policy of a run.

  Args:
    runs: Workdirs by the name that columns have before the policy, "" for none.
  """
  found: dict[str, dict[str, JsonRow]] = {}
  for run, (root, stages, *_) in runs.items():
    paths = [path for name in stages for path in (root / name).glob("*/*/scores.json")]
    for path in sorted(paths, key=lambda path: (path.parent.name != "sft", path)):
      if path.parts[-3] == HELD_OUT:
        continue  # The page begins with its table.
      benchmark, policy, _ = path.parts[-3:]
      column = " · ".join(filter(None, (run, policy.upper())))
      found.setdefault(benchmark, {})[column] = read_json_or_empty(path)
  return [{"name": name, **make_benchmark_table(found[name])} for name in sorted(found)]


def make_benchmark_table(scores: dict[str, JsonRow]) -> JsonRow:
  """Returns the measures of a benchmark, and how the recipes of its columns differ."""
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
  """Returns a table for each set of pairs that a stage compared judges on."""
  tables = []
  for name, found in read_json_or_empty(stage / "results.json").items():
    if isinstance(found, dict) and "judges" in found:
      judges = found["judges"]
      measures = list(dict.fromkeys(m for stats in judges.values() for m in stats))
      rows = {
        judge: [format_interval(stats.get(m) or {}, PERCENT) for m in measures]
        for judge, stats in judges.items()
      }
      title = f"{found.get('pairs', 0):,} {SETS.get(name, name)}"
      tables.append({"title": title, "measures": measures, "rows": rows})
  return tables


def collect_label_rates(root: Path, stages: Iterable[str]) -> list[JsonRow]:
  """Returns the rates of each stage that judged pairs or claims, in order.

  Returns:
    For each stage its rates.json, what became of pairs or answers, and the other
    counts by their names.
  """
  tables = []
  for name in stages:
    rates = read_json_or_empty(root / name / "rates.json")
    outcomes = {key: said for key, said in OUTCOME_LABELS.items() if key in rates}
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
        "outcomes": {said: rates[key] for key, said in outcomes.items()},
        "others": others,
      }
    )
  return tables
