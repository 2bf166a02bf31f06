"""Runs beside each other: one page of their curves, results, labels and answers."""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlmrlaif_jax.core.files import differing
from vlmrlaif_jax.core.stage_log import duration
from vlmrlaif_jax.evals.summary import (
  FRACTION,
  PLAIN,
  POINTS,
  Format,
  Measure,
  at,
  format_interval,
  is_sure,
)
from vlmrlaif_jax.report import page
from vlmrlaif_jax.report.charts import chart
from vlmrlaif_jax.report.compare_answers import samples
from vlmrlaif_jax.report.files import (
  Row,
  Workdir,
  open_workdir,
  read_json,
  read_lines,
  stage_facts,
)
from vlmrlaif_jax.report.stages import Columns, alarms_by_name, columns_of, lead_first
from vlmrlaif_jax.report.verdict import LABELS, measures_of, verdict

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
  """Returns all that the template shows."""
  runs = dict(zip(names_of(roots), map(open_workdir, roots), strict=True))
  configs = [read_json(root / "config.json") for root in roots]
  return {
    "runs": list(runs),
    "verdicts": {name: verdict(run.results, *run.pair) for name, run in runs.items()},
    "pairs": {name: run.pair for name, run in runs.items()},
    "rows": result_rows(list(runs.values())),
    "benchmarks": benchmark_rows(runs),
    "labels": table_rows(map(rates_of, runs.values())),
    "times": table_rows(map(times_of, runs.values())),
    "stages": list(stage_charts(runs)),
    "alarms": {
      name: [
        alarm | {"stage": stage}
        for stage in run.stages
        for alarm in alarms_by_name(read_lines(run.root / stage / "alarms.jsonl"))
      ]
      for name, run in runs.items()
    },
    "settings": differing(*configs),
    "samples": samples(runs),
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


def result_rows(runs: Sequence[Workdir]) -> list[Row]:
  """Returns a row a measure: both policies' values of each run, and the difference."""
  policies = [p for run in runs for p in run.results.get("policies", {}).values()]
  rows = []
  for measure in measures_of(policies):
    form = PLAIN if measure == ("judge_score",) else POINTS
    cells = [cell for run in runs for cell in result_cells(run, measure, form)]
    label = LABELS.get(measure, measure[-1].replace("_", " "))
    rows.append({"label": label, "part": measure[0] == "by_kind", "cells": cells})
  return rows


def result_cells(run: Workdir, measure: Measure, form: Format) -> list[Row]:
  """Returns (before, after, difference) of a measure in a run."""
  policies = run.results.get("policies", {})
  stats = [at(policies.get(name, {}), measure) for name in run.pair]
  change = at(run.results.get("difference") or {}, measure)
  shown = functools.partial(format_interval, form=form, missing="")
  return [
    *({"text": shown(stat), "sure": False} for stat in stats),
    {"text": shown(change, sign="+"), "sure": is_sure(change)},
  ]


def benchmark_rows(runs: dict[str, Workdir]) -> Row:
  """Returns measures of the benchmarks, a column for each policy of each run."""
  columns: dict[str, Row] = {}
  recipes: dict[str, list[Row]] = {}
  for run, (root, stages, *_) in runs.items():
    for path in sorted(p for s in stages for p in (root / s).glob("*/*/scores.json")):
      name, policy = path.parts[-3:-1]
      told = read_json(path)
      recipes.setdefault(name, []).append(told.get("recipe", {}))
      columns.setdefault(f"{run} · {policy.upper()}", {}).update(
        {
          f"{name}: {measure.replace('_', ' ')}": format_interval(stat, FRACTION)
          for measure, stat in told["scores"].items()
        }
      )
  return {
    "columns": list(columns),
    "rows": table_rows(columns.values()),
    "differs": sorted(
      f"{name}: {key}" for name, each in recipes.items() for key in differing(*each)
    ),
  }


def table_rows(columns: Iterable[Row]) -> list[Row]:
  """Returns a row for each label that any column has, None where one lacks it."""
  columns = list(columns)
  labels = dict.fromkeys(label for each in columns for label in each)
  return [
    {"label": label, "cells": [each.get(label) for each in columns]} for label in labels
  ]


def rates_of(run: Workdir) -> Row:
  """Returns what rates.json of each stage holds."""
  return {
    f"{stage}: {key.replace('_', ' ')}": value
    for stage in run.stages
    for key, value in read_json(run.root / stage / "rates.json").items()
  }


def times_of(run: Workdir) -> Row:
  """Returns how long each stage took."""
  done = {stage: read_json(run.root / stage / "done.json") for stage in run.stages}
  return {
    stage: duration(each["seconds"]) if each else "not finished"
    for stage, each in done.items()
  }


# Curves.


def stage_charts(runs: dict[str, Workdir]) -> Iterator[Row]:
  """Yields the curves of each stage, those of all runs over each other."""
  titles = {
    stage: stage_facts(run.root, stage).title
    for run in runs.values()
    for stage in run.stages
  }
  for stage, title in titles.items():
    columns = {
      name: columns_of(read_lines(run.root / stage / "metrics.jsonl"))
      for name, run in runs.items()
    }
    keys = list(dict.fromkeys(key for each in columns.values() for key in each))
    leads = lead_first(keys)
    if keys:
      yield {
        "name": stage,
        "title": title,
        "charts": [overlaid(key, columns) for key in leads],
        "others": [overlaid(key, columns) for key in keys if key not in leads],
      }


def overlaid(key: str, columns: dict[str, Columns]) -> Row:
  """Returns a metric of several runs; a run has the same colour in all charts."""
  lines = {run: each[key] for run, each in columns.items() if key in each}
  places = {run: place for place, run in enumerate(columns, 1)}
  made = chart(key, lines, shared=True)
  for line in made["lines"]:
    line["place"] = places[line["name"]]
  return made
