"""Tables of the report next to the evaluation's: benchmarks, judges and labels."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from vlmrlaif_jax.core.files import differing
from vlmrlaif_jax.evals.summary import (
  FRACTION,
  HELD_OUT,
  PERCENT,
  format_interval,
  has_interval,
  largest_n,
)
from vlmrlaif_jax.report.files import Row, Workdir, read_json, stage_facts
from vlmrlaif_jax.report.verdict import mean_difference

SETS = {
  "labels": "held-out pairs, as they were labelled",
  "truth": "pairs of answers to the benchmark, as truth has them",
  "shifted": "pairs of answers about another world, as truth has them",
}
OUTCOMES = {
  "kept": "kept",
  "tie": "tie",
  "order_inconsistent": "changed with the order",
  "unparsable": "not understood",
}
COUNTS = {
  "identical": "pairs alike, and not judged",
  "empty": "with an empty answer, and not judged",
  "too_long": "too long, and not judged",
  "truth_pairs": "kept pairs that truth tells apart",
}
IN_WORDS = (  # Rates that the page has a sentence for.
  *("asked", "claims", "first_chosen", "claims_denied", "truth_agreement"),
  *("chosen_words", "rejected_words"),
)


def benchmarks_view(runs: Mapping[str, Workdir]) -> list[Row]:
  """Returns a table for each benchmark: a row a measure, a column a policy of a run.

  Args:
    runs: Workdirs by the name that columns have before the policy, "" for none.
  """
  found: dict[str, dict[str, Row]] = {}
  for run, (root, stages, *_) in runs.items():
    paths = [path for name in stages for path in (root / name).glob("*/*/scores.json")]
    for path in sorted(paths, key=lambda path: (path.parent.name != "sft", path)):
      if path.parts[-3] == HELD_OUT:
        continue  # The page begins with its table.
      benchmark, policy, _ = path.parts[-3:]
      column = " · ".join(filter(None, (run, policy.upper())))
      found.setdefault(benchmark, {})[column] = read_json(path)
  return [{"name": name, **benchmark_table(found[name])} for name in sorted(found)]


def benchmark_table(scores: dict[str, Row]) -> Row:
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
          mean_difference(first, last), FRACTION, sign="+", missing=""
        ),
        "apart": has_interval(first)
        and has_interval(last)
        and (first["high"] < last["low"] or last["high"] < first["low"]),
        "n": largest_n(stats),
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
    "differs": differing(*(each.get("recipe", {}) for each in scores.values())),
  }


def judges_view(stage: Path) -> list[Row]:
  """Returns a table for each set of pairs that a stage compared judges on."""
  tables = []
  for name, found in read_json(stage / "results.json").items():
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


def labels_view(root: Path, stages: Iterable[str]) -> list[Row]:
  """Returns the rates of each stage that judged pairs or claims, in order.

  Returns:
    For each stage its rates.json, what became of pairs or answers, and the other
    counts by their names.
  """
  tables = []
  for name in stages:
    rates = read_json(root / name / "rates.json")
    outcomes = {key: said for key, said in OUTCOMES.items() if key in rates}
    if "claims" in rates:
      answers = [key for key in rates if key.startswith("answers_")]
      outcomes = {
        key: key.removeprefix("answers_").replace("_", " ") for key in answers
      }
    elif "asked" not in rates:
      continue
    others = {
      COUNTS.get(key, key.replace("_", " ")): value
      for key, value in rates.items()
      if value is not None and key not in (*IN_WORDS, *outcomes)
    }
    tables.append(
      {
        "title": stage_facts(root, name).title,
        "rates": rates,
        "outcomes": {said: rates[key] for key, said in outcomes.items()},
        "others": others,
      }
    )
  return tables
