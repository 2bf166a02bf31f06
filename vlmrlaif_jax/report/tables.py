"""Tables of the report beside the evaluation's: benchmarks of papers, and judges."""

from pathlib import Path

from vlmrlaif_jax.core.files import differing
from vlmrlaif_jax.evals.summary import (
  FRACTION,
  PERCENT,
  format_interval,
  format_row,
  has_interval,
  is_number,
  largest_n,
)
from vlmrlaif_jax.report.files import Row, read_json

SETS = {
  "labels": "held-out pairs, as they were labelled",
  "truth": "pairs of answers to the benchmark, as truth has them",
  "shifted": "pairs of answers about another world, as truth has them",
}


def benchmarks_view(stage: Path) -> list[Row]:
  """Returns a table for each benchmark of a stage: a row a measure, a column a policy.

  SFT stands first.
  """
  found: dict[str, dict[str, Row]] = {}
  paths = stage.glob("*/*/scores.json")
  for path in sorted(paths, key=lambda path: (path.parent.name != "sft", path)):
    benchmark, policy, _ = path.parts[-3:]
    found.setdefault(benchmark, {})[policy] = read_json(path)
  return [{"name": name, **benchmark_table(found[name])} for name in sorted(found)]


def benchmark_table(scores: dict[str, Row]) -> Row:
  """One benchmark: its measures, and how the recipes of the policies differ."""
  policies = list(scores)
  measures = dict.fromkeys(name for each in scores.values() for name in each["scores"])
  rows = []
  for name in measures:
    stats = {policy: scores[policy]["scores"].get(name, {}) for policy in policies}
    rows.append(
      {
        "measure": name.replace("_", " ").replace(".", ": "),
        "cells": list(format_row(stats, FRACTION).values()),
        "difference": moved(stats[policies[0]], stats[policies[-1]]),
        "apart": apart(stats[policies[0]], stats[policies[-1]]),
        "n": largest_n(stats.values()),
      }
    )
  faults = [
    f"{policy}: {count} {name}"
    for policy in policies
    for name, count in scores[policy].get("counts", {}).items()
    if count and name != "cases"
  ]
  recipes = [scores[policy].get("recipe", {}) for policy in policies]
  return {
    "policies": policies,
    "rows": rows,
    "faults": faults,
    "differs": differing(*recipes),
  }


def moved(first: Row, last: Row) -> str:
  """Formats the difference of the last policy's mean and the first's."""
  if not (is_number(first.get("mean")) and is_number(last.get("mean"))):
    return ""
  return format_interval({"mean": last["mean"] - first["mean"]}, FRACTION, sign="+")


def apart(first: Row, last: Row) -> bool:
  """Whether the intervals of two means do not meet."""
  if not (has_interval(first) and has_interval(last)):
    return False
  return first["high"] < last["low"] or last["high"] < first["low"]


def judges_view(stage: Path) -> list[Row]:
  """Returns a table for each set of pairs that a stage compared judges on."""
  results = read_json(stage / "results.json")
  found = []
  for name, each in results.items():
    if not isinstance(each, dict) or "judges" not in each:
      continue
    judges = each["judges"].values()
    measures = list(dict.fromkeys(name for stats in judges for name in stats))
    rows = [
      {
        "judge": judge.replace("_", " "),
        "cells": list(
          format_row({m: stats.get(m) or {} for m in measures}, PERCENT).values()
        ),
      }
      for judge, stats in each["judges"].items()
    ]
    found.append(
      {
        "title": f"{each.get('pairs', 0):,} {SETS.get(name, name)}",
        "measures": [measure.replace("_", " ") for measure in measures],
        "rows": rows,
      }
    )
  return found
