"""Runs beside each other: one page of their curves, results, labels and answers."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmrlaif_jax.core.files import differing
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
from vlmrlaif_jax.report.stages import (
  Columns,
  alarms_by_name,
  columns_of,
  lead_first,
  time_of,
)
from vlmrlaif_jax.report.tables import benchmarks_view
from vlmrlaif_jax.report.verdict import comparison_row, measures_of, verdict

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
    "rows": [
      {
        name: comparison_row(run.results, measure, *run.pair)
        for name, run in runs.items()
      }
      for measure in measures_of([run.results for run in runs.values()])
    ],
    "benchmarks": benchmarks_view(runs),
    "labels": table_rows(runs.values(), rates_of),
    "times": table_rows(
      runs.values(), lambda stage: {stage.name: time_of(read_json(stage / "done.json"))}
    ),
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


def table_rows(
  runs: Iterable[Workdir], cells: Callable[[Path], Mapping[str, Any]]
) -> list[Row]:
  """Returns a row for each label that any run has, None where one lacks it.

  Args:
    runs: The columns.
    cells: Folder of a stage -> its values by label.
  """
  columns = [
    {label: x for name in run.stages for label, x in cells(run.root / name).items()}
    for run in runs
  ]
  labels = dict.fromkeys(label for each in columns for label in each)
  return [
    {"label": label, "cells": [each.get(label) for each in columns]} for label in labels
  ]


def rates_of(stage: Path) -> Row:
  """Returns the content of rates.json."""
  rates = read_json(stage / "rates.json")
  return {f"{stage.name}: {key.replace('_', ' ')}": x for key, x in rates.items()}


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
