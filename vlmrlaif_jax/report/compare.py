"""Runs beside each other: one page of their curves, results, labels and answers."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from vlmrlaif_jax.report.stages import alarms_by_name, columns_of, lead_first
from vlmrlaif_jax.report.verdict import LABELS, verdict

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
    "labels": table_rows(runs, rates_of),
    "times": table_rows(runs, times_of),
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
  kinds = dict.fromkeys(
    kind
    for run in runs
    for policy in run.results.get("policies", {}).values()
    for kind in policy.get("by_kind", {})
  )
  measures = [("accuracy",), *(("by_kind", kind) for kind in kinds)]
  rows = []
  for measure in [*measures, ("hallucination",), ("judge_score",)]:
    form = PLAIN if measure == ("judge_score",) else POINTS
    cells = [cell for run in runs for cell in result_cells(run, measure, form)]
    if any(cell["text"] for cell in cells):
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
  found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
  recipes: dict[tuple[str, str], Row] = {}
  for run, (root, stages, *_) in runs.items():
    paths = (p for name in stages for p in (root / name).glob("*/*/scores.json"))
    for path in sorted(paths):
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


def table_rows(
  runs: dict[str, Workdir], cells_of: Callable[[Workdir], Row]
) -> list[Row]:
  """Returns a row for each label, with the cell of each run, None where it has none."""
  cells = [cells_of(run) for run in runs.values()]
  labels = dict.fromkeys(label for each in cells for label in each)
  return [
    {"label": label, "cells": [each.get(label) for each in cells]} for label in labels
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
    charts = {
      key: overlaid(key, {run: c[key] for run, c in columns.items() if key in c}, runs)
      for key in [*leads, *(key for key in keys if key not in leads)]
    }
    if charts:
      made = list(charts.values())
      yield {
        "name": stage,
        "title": title,
        "charts": made[: len(leads)],
        "others": made[len(leads) :],
      }


def overlaid(key: str, lines: Row, runs: Iterable[str]) -> Row:
  """Returns one metric of several runs; a run has the same colour in all charts."""
  made = chart(key, lines, shared=True)
  places = {run: place for place, run in enumerate(runs, 1)}
  for line in made["lines"]:
    line["place"] = places[line["name"]]
  return made
