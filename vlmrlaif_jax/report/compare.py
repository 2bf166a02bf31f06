"""Runs beside each other: one page of their curves, results, labels and answers."""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmrlaif_jax.core.files import aligned, differing
from vlmrlaif_jax.report import page
from vlmrlaif_jax.report.charts import chart
from vlmrlaif_jax.report.files import (
  Row,
  Workdir,
  open_workdir,
  read_json,
  read_lines,
  sample_files,
  stage_facts,
)
from vlmrlaif_jax.report.samples import fitted
from vlmrlaif_jax.report.sources import (
  PROMPTS,
  answer_group,
  base,
  grouped,
  sampled,
  source,
  varied,
)
from vlmrlaif_jax.report.stages import (
  Columns,
  alarms_by_name,
  columns_of,
  lead_first,
  time_of,
)
from vlmrlaif_jax.report.tables import benchmarks_view, comparison, verdict

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
    "verdicts": {name: verdict(run) for name, run in runs.items()},
    "pairs": {name: run.pair for name, run in runs.items()},
    "rows": comparison(runs),
    "benchmarks": benchmarks_view(runs),
    "labels": aligned(*map(rates_of, runs.values())),
    "times": aligned(*map(times_of, runs.values())),
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


def rates_of(run: Workdir) -> Row:
  """Returns what stands in rates.json of each stage."""
  return {
    f"{stage}: {key.replace('_', ' ')}": x
    for stage in run.stages
    for key, x in read_json(run.root / stage / "rates.json").items()
  }


def times_of(run: Workdir) -> Row:
  """Returns how long each stage took."""
  return {
    name: time_of(read_json(run.root / name / "done.json")) for name in run.stages
  }


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


# Answers to the same prompts.


def samples(runs: dict[str, Workdir]) -> Row:
  """Returns the same prompts' answers side by side, for the viewer."""
  titles = {
    name: facts.title
    for run in runs.values()
    for name in run.stages
    if (facts := stage_facts(run.root, name)).has_rollouts
  }
  sources = [
    held_out({name: run for name, run in runs.items() if run.evaluation}),
    *(sampled_by_all(runs, name, title) for name, title in titles.items()),
  ]
  return fitted([each for each in sources if each["groups"]]) | {"alarms": {}}


def held_out(runs: dict[str, Workdir]) -> Row:
  """Returns the questions of the evaluation that more than one run was asked."""
  asked: dict[tuple[str, ...], dict[str, Row]] = {}
  for name, run in runs.items():
    for row in read_lines(run.root / run.evaluation / "answers.jsonl"):
      asked.setdefault(key_of(run, row, row["question"]), {})[name] = row
  both = [rows for rows in asked.values() if len(rows) > 1]
  if not both:
    return {"groups": []}

  def marks(rows: dict[str, Row]) -> tuple[Any, ...]:
    """Returns whether each run's last policy was right."""
    last = [row.get(runs[name].pair[1]) or {} for name, row in rows.items()]
    return tuple(answer.get("correct") for answer in last)

  chosen = varied(both, marks, lambda rows: next(iter(rows.values()))["kind"])
  groups = [held_out_group(runs, rows) for rows in chosen]
  first = next(iter(runs.values()))
  title = stage_facts(first.root, first.evaluation).title
  file = f"{first.evaluation}/answers.jsonl"
  return source(first.evaluation, title, file, (groups, len(both)))


def key_of(run: Workdir, row: Row, question: str) -> tuple[str, ...]:
  """Returns what makes two prompts the same: question and content of the video."""
  video = content(run.root / "world/videos" / (row.get("video") or ""))
  return row["id"], question, str(row.get("truth")), video


@functools.cache
def content(path: Path) -> str:
  """Returns a digest of a file, "" if there is none."""
  return hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else ""


def held_out_group(runs: dict[str, Workdir], rows: dict[str, Row]) -> Row:
  """Returns the answers of the two policies of each run, equal ones once."""
  groups = {run: answer_group(row) for run, row in rows.items()}
  told: dict[tuple[str, str], Row] = {}
  for run, group in groups.items():
    for answer in group["answers"]:
      if answer["name"].lower() in runs[run].pair:
        # Each run has a reward model of its own, so scores do not compare.
        known = answer | {"score": None, "by": []}
        told.setdefault((answer["name"], answer["text"]), known)["by"].append(run)
  first = next(iter(rows))
  before = runs[first].pair[0].upper()
  answers = [
    answer | {"name": f"{name} of {', '.join(answer.pop('by'))}"}
    for (name, _), answer in sorted(told.items(), key=lambda item: item[0][0] != before)
  ]
  return groups[first] | {"root": runs[first].root, "answers": answers}


def sampled_by_all(runs: dict[str, Workdir], stage: str, title: str) -> Row:
  """Returns prompts that more than one run answered at the same step of a stage."""
  asked: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
  for name, run in runs.items():
    for step, path in sample_files(run.root / stage):
      for group in grouped(read_lines(path)):
        key = (step, *key_of(run, group[0] | {"truth": ""}, group[0]["prompt"]))
        asked.setdefault(key, {})[name] = group
  both = {key: found for key, found in asked.items() if len(found) > 1}
  by_step: dict[int, list[Row]] = {}
  for (step, *_), found in both.items():
    groups = by_step.setdefault(step, [])
    if len(groups) < PROMPTS // 2:
      groups.append(sampled_group(runs, step, found))
  groups = [group for each in by_step.values() for group in each]
  return source(stage, title, f"{stage}/samples", (groups, len(both)))


def sampled_group(
  runs: dict[str, Workdir], step: int, found: dict[str, list[Row]]
) -> Row:
  """Returns each run's best answer."""
  first, (row, *_) = next(iter(found.items()))
  answers = []
  for run, rows in found.items():
    name = f"{run}, best of {len(rows)}" if len(rows) > 1 else run
    answers.append(sampled(rows, step)["answers"][0] | {"name": name})
  made = base(row, row["prompt"], step) | {"root": runs[first].root}
  return made | {"answers": answers, "in_order": True}
