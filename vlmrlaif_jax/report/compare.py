"""Runs beside each other: one page of their curves, results, labels and answers."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vlmrlaif_jax.core.files import differing
from vlmrlaif_jax.core.stage_log import duration
from vlmrlaif_jax.core.stage_names import title
from vlmrlaif_jax.evals.summary import (
  FRACTION,
  PLAIN,
  POINTS,
  Format,
  at,
  compared,
  format_interval,
  is_sure,
)
from vlmrlaif_jax.report import page
from vlmrlaif_jax.report.charts import chart
from vlmrlaif_jax.report.compare_answers import samples
from vlmrlaif_jax.report.files import read_json, read_lines
from vlmrlaif_jax.report.stages import (
  alarms_by_name,
  columns_of,
  lead_first,
  stages_there,
)
from vlmrlaif_jax.report.verdict import LABELS, verdict

Row: TypeAlias = dict[str, Any]

RUNS = 6  # Lines that can be told apart.


def write_comparison(
  workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> Path:
  """Writes a page of several runs, and returns its path."""
  roots = [Path(workdir) for workdir in workdirs]
  for root in roots:
    if not root.is_dir():
      raise FileNotFoundError(f"no such folder: {root}; give the workdirs of runs")
  if not 2 <= len(roots) <= RUNS:
    raise ValueError(f"give 2 to {RUNS} workdirs to compare, not {len(roots)}")
  return page.write_page("compare.html.j2", compare(roots), Path(out))


def compare(roots: Sequence[Path]) -> Row:
  """All that the template shows."""
  runs = dict(zip(names_of(roots), roots, strict=True))
  results = {name: read_json(root / "eval/results.json") for name, root in runs.items()}
  pairs = {n: compared(r["policies"]) if r else ("", "") for n, r in results.items()}
  configs = [read_json(root / "config.json") for root in roots]
  return {
    "runs": list(runs),
    "verdicts": {name: verdict(results[name], *pairs[name]) for name in runs},
    "pairs": pairs,
    "rows": result_rows(results, pairs),
    "benchmarks": benchmark_rows(runs),
    "labels": rate_rows(runs),
    "times": time_rows(runs),
    "stages": list(stage_charts(runs)),
    "alarms": {
      name: [
        alarm | {"stage": stage}
        for stage in stages_there(root)
        for alarm in alarms_by_name(read_lines(root / stage / "alarms.jsonl"))
      ]
      for name, root in runs.items()
    },
    "settings": differing(*configs),
    "samples": samples(runs, pairs),
  }


def names_of(roots: Sequence[Path]) -> list[str]:
  """The folders' names; where two have the same, with those of their parents."""
  paths = [root.resolve() for root in roots]
  for depth in range(1, max(len(path.parts) for path in paths) + 1):
    names = ["/".join(path.parts[-depth:]) for path in paths]
    if len(set(names)) == len(names):
      return names
  raise ValueError(f"the same workdir is given twice: {', '.join(map(str, roots))}")


# Tables.


def result_rows(
  results: dict[str, Row], pairs: dict[str, tuple[str, str]]
) -> list[Row]:
  """A row a measure; of each run both policies' values and their difference."""
  kinds = dict.fromkeys(
    kind
    for each in results.values()
    for policy in each.get("policies", {}).values()
    for kind in policy.get("by_kind", {})
  )
  measures = [("accuracy",), *(("by_kind", kind) for kind in kinds)]
  rows = []
  for measure in [*measures, ("hallucination",), ("judge_score",)]:
    form = PLAIN if measure == ("judge_score",) else POINTS
    cells = [
      cell
      for name, each in results.items()
      for cell in result_cells(each, measure, pairs[name], form)
    ]
    if any(cell["text"] for cell in cells):
      label = LABELS.get(measure, measure[-1].replace("_", " "))
      rows.append({"label": label, "part": measure[0] == "by_kind", "cells": cells})
  return rows


def result_cells(
  results: Row, measure: tuple[str, ...], pair: tuple[str, str], form: Format
) -> list[Row]:
  """(before, after, difference) of a measure in a run."""
  if not results:
    return [{"text": "", "sure": False}] * 3
  stats = [at(results["policies"][name], measure) for name in pair]
  change = at(results.get("difference") or {}, measure)
  shown = functools.partial(format_interval, form=form, missing="")
  return [
    *({"text": shown(stat), "sure": False} for stat in stats),
    {"text": shown(change, sign="+"), "sure": is_sure(change)},
  ]


def benchmark_rows(runs: dict[str, Path]) -> Row:
  """Measures of the benchmarks, a column for each policy of each run."""
  found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
  recipes: dict[tuple[str, str], Row] = {}
  for run, root in runs.items():
    for path in sorted(root.glob("benchmarks/*/*/scores.json")):
      name, policy = path.parts[-3:-1]
      told = read_json(path)
      recipes[f"{run} · {policy}", name] = told.get("recipe", {})
      for measure, stat in told["scores"].items():
        found.setdefault((name, measure), {})[run, policy] = format_interval(
          stat, FRACTION
        )
  columns = list(dict.fromkeys(column for row in found.values() for column in row))
  return {
    "columns": [f"{run} · {policy.upper()}" for run, policy in columns],
    "rows": [
      {
        "label": f"{name}: {measure.replace('_', ' ')}",
        "cells": [row.get(column, "") for column in columns],
      }
      for (name, measure), row in found.items()
    ],
    "differs": sorted(
      {
        f"{name}: {key}"
        for name in {name for _, name in recipes}
        for key in differing(*(r for (_, n), r in recipes.items() if n == name))
      }
    ),
  }


def rate_rows(runs: dict[str, Path]) -> list[Row]:
  """What rates.json of each stage that labels holds."""
  found: dict[str, dict[str, Any]] = {}
  for run, root in runs.items():
    for stage in stages_there(root):
      for key, value in read_json(root / stage / "rates.json").items():
        found.setdefault(f"{stage}: {key.replace('_', ' ')}", {})[run] = value
  return [
    {"label": key, "cells": [row.get(run) for run in runs]}
    for key, row in found.items()
  ]


def time_rows(runs: dict[str, Path]) -> list[Row]:
  """How long each stage took."""
  found: dict[str, dict[str, str]] = {}
  for run, root in runs.items():
    for stage in stages_there(root):
      done = read_json(root / stage / "done.json")
      said = duration(done["seconds"]) if done else "not finished"
      found.setdefault(stage, {})[run] = said
  return [
    {"label": stage, "cells": [row.get(run, "") for run in runs]}
    for stage, row in found.items()
  ]


# Curves.


def stage_charts(runs: dict[str, Path]) -> Iterator[Row]:
  """For each stage that a run has, its curves over each other."""
  stages = dict.fromkeys(s for root in runs.values() for s in stages_there(root))
  for stage in stages:
    columns = {
      run: columns_of(read_lines(root / stage / "metrics.jsonl"))
      for run, root in runs.items()
    }
    keys = list(dict.fromkeys(key for each in columns.values() for key in each))
    leads = lead_first(keys)
    charts = {
      key: overlaid(key, {run: c[key] for run, c in columns.items() if key in c}, runs)
      for key in [*leads, *(key for key in keys if key not in leads)]
    }
    if charts:
      made = list(charts.values())
      yield {
        "name": stage,
        "title": title(stage),
        "charts": made[: len(leads)],
        "others": made[len(leads) :],
      }


def overlaid(key: str, lines: Row, runs: dict[str, Path]) -> Row:
  """One metric of several runs; a run has the same colour in all charts."""
  made = chart(key, lines, shared=True)
  places = {run: place for place, run in enumerate(runs, 1)}
  for line in made["lines"]:
    line["place"] = places[line["name"]]
  return made
