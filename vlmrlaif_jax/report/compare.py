"""Compares several runs on one page: their curves, results, labels and answers."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmrlaif_jax.core.files import align_leaves, find_differences
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import list_sample_files
from vlmrlaif_jax.report import page
from vlmrlaif_jax.report.charts import draw_chart
from vlmrlaif_jax.report.files import (
  Workdir,
  open_report_workdir,
  read_json_or_empty,
  read_rows,
  read_stage_facts,
)
from vlmrlaif_jax.report.samples import fit_sources
from vlmrlaif_jax.report.sources import (
  MAX_PROMPTS,
  group_by_prompt,
  make_answer_group,
  make_base_group,
  make_sampled_group,
  make_source,
  select_varied,
)
from vlmrlaif_jax.report.stages import (
  Columns,
  format_time,
  group_alarms,
  order_metrics,
  read_columns,
)
from vlmrlaif_jax.report.tables import (
  collect_benchmarks,
  compare_all_policies,
  format_verdict,
)

MAX_RUNS = 6  # More curves in one chart would be hard to distinguish.


def write_comparison(
  workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> Path:
  """Writes a page that compares runs and returns its path.

  Raises:
    FileNotFoundError: A workdir does not exist.
    ValueError: The number of workdirs is not from 2 to MAX_RUNS, or one is repeated.
  """
  roots = [Path(workdir) for workdir in workdirs]
  for root in roots:
    if not root.is_dir():
      raise FileNotFoundError(f"no such folder: {root}; give the workdirs of runs")
  if not 2 <= len(roots) <= MAX_RUNS:
    raise ValueError(f"give 2 to {MAX_RUNS} workdirs to compare, got {len(roots)}")
  return page.write_page("compare.html.j2", collect_comparison(roots), Path(out))


def collect_comparison(roots: Sequence[Path]) -> JsonRow:
  """Returns the data of the template."""
  runs = dict(zip(name_runs(roots), map(open_report_workdir, roots), strict=True))
  configs = [read_json_or_empty(root / "config.json") for root in roots]
  return {
    "runs": list(runs),
    "verdicts": {name: format_verdict(run) for name, run in runs.items()},
    "pairs": {name: run.pair for name, run in runs.items()},
    "rows": compare_all_policies(runs),
    "benchmarks": collect_benchmarks(runs),
    "labels": align_leaves(*map(read_rates, runs.values())),
    "times": align_leaves(*map(read_times, runs.values())),
    "stages": list(make_stage_charts(runs)),
    "alarms": {
      name: [
        alarm | {"stage": stage}
        for stage in run.stages
        for alarm in group_alarms(read_rows(run.root / stage / "alarms.jsonl"))
      ]
      for name, run in runs.items()
    },
    "settings": find_differences(*configs),
    "samples": collect_shared_samples(runs),
  }


def name_runs(roots: Sequence[Path]) -> list[str]:
  """Returns the names of the folders, with parents where names are equal."""
  paths = [root.resolve() for root in roots]
  for depth in range(1, max(len(path.parts) for path in paths) + 1):
    names = ["/".join(path.parts[-depth:]) for path in paths]
    if len(set(names)) == len(names):
      return names
  raise ValueError(f"the same workdir is given twice: {', '.join(map(str, roots))}")


def read_rates(run: Workdir) -> JsonRow:
  """Returns the rates of each stage's rates.json."""
  return {
    f"{stage}: {key.replace('_', ' ')}": x
    for stage in run.stages
    for key, x in read_json_or_empty(run.root / stage / "rates.json").items()
  }


def read_times(run: Workdir) -> JsonRow:
  """Returns the duration of each stage."""
  return {
    name: format_time(read_json_or_empty(run.root / name / "done.json"))
    for name in run.stages
  }


def make_stage_charts(runs: dict[str, Workdir]) -> Iterator[JsonRow]:
  """Yields the charts of each stage, with the curves of all runs."""
  titles = {
    stage: read_stage_facts(run.root, stage).title
    for run in runs.values()
    for stage in run.stages
  }
  for stage, title in titles.items():
    columns = {
      name: read_columns(read_rows(run.root / stage / "metrics.jsonl"))
      for name, run in runs.items()
    }
    keys = list(dict.fromkeys(key for each in columns.values() for key in each))
    leads = order_metrics(keys)
    if keys:
      yield {
        "name": stage,
        "title": title,
        "charts": [overlay_metric(key, columns) for key in leads],
        "others": [overlay_metric(key, columns) for key in keys if key not in leads],
      }


def overlay_metric(key: str, columns: dict[str, Columns]) -> JsonRow:
  """Returns a chart of a metric; a run has the same color in all charts."""
  lines = {run: each[key] for run, each in columns.items() if key in each}
  places = {run: place for place, run in enumerate(columns, 1)}
  chart = draw_chart(key, lines, shared=True)
  for line in chart["lines"]:
    line["place"] = places[line["name"]]
  return chart


# Answers to the same prompts.


def collect_shared_samples(runs: dict[str, Workdir]) -> JsonRow:
  """Returns the answers of all runs to the same prompts, for the viewer."""
  titles = {
    name: facts.title
    for run in runs.values()
    for name in run.stages
    if (facts := read_stage_facts(run.root, name)).has_rollouts
  }
  sources = [
    collect_held_out({name: run for name, run in runs.items() if run.evaluation}),
    *(collect_common_samples(runs, name, title) for name, title in titles.items()),
  ]
  return fit_sources([each for each in sources if each["groups"]]) | {"alarms": {}}


def collect_held_out(runs: dict[str, Workdir]) -> JsonRow:
  """Returns the evaluation's questions that more than one run answered."""
  by_prompt: dict[tuple[str, ...], dict[str, JsonRow]] = {}
  for name, run in runs.items():
    for row in read_rows(run.root / run.evaluation / "answers.jsonl"):
      by_prompt.setdefault(make_prompt_key(run, row, row["question"]), {})[name] = row
  common = [rows for rows in by_prompt.values() if len(rows) > 1]
  if not common:
    return {"groups": []}

  def marks(rows: dict[str, JsonRow]) -> tuple[Any, ...]:
    """Returns whether each run's last policy was right."""
    last = [row.get(runs[name].pair[1]) or {} for name, row in rows.items()]
    return tuple(answer.get("correct") for answer in last)

  chosen = select_varied(common, marks, lambda rows: next(iter(rows.values()))["kind"])
  groups = [make_held_out_group(runs, rows) for rows in chosen]
  first = next(iter(runs.values()))
  title = read_stage_facts(first.root, first.evaluation).title
  file = f"{first.evaluation}/answers.jsonl"
  return make_source(first.evaluation, title, file, (groups, len(common)))


def make_prompt_key(run: Workdir, row: JsonRow, question: str) -> tuple[Any, ...]:
  """Returns a key that is equal for the same question about the same video content."""
  name = row.get("video")
  video = _hash_video(run.root / "world/videos" / name) if name else b""
  return row["id"], question, str(row.get("truth")), video


@functools.cache  # Many questions share a video.
def _hash_video(path: Path) -> bytes:
  """Returns the hash of a video, b"" without one."""
  # Imported here, so that a comparison without videos needs no decoder.
  from vlmrlaif_jax.data.video import VideoError, hash_video_in_worker

  try:
    return hash_video_in_worker(path)
  except VideoError:
    return b""


def make_held_out_group(runs: dict[str, Workdir], rows: dict[str, JsonRow]) -> JsonRow:
  """Returns the answers of both policies of each run, equal answers once."""
  groups = {run: make_answer_group(row) for run, row in rows.items()}
  merged: dict[tuple[str, str], JsonRow] = {}
  for run, group in groups.items():
    for answer in group["answers"]:
      if answer["name"].lower() in runs[run].pair:
        # Each run has its own reward model, so scores of runs are not comparable.
        entry = answer | {"score": None, "by": []}
        merged.setdefault((answer["name"], answer["text"]), entry)["by"].append(run)
  first = next(iter(rows))
  before = runs[first].pair[0].upper()
  answers = [
    answer | {"name": f"{name} of {', '.join(answer.pop('by'))}"}
    for (name, _), answer in sorted(merged.items(), key=lambda x: x[0][0] != before)
  ]
  return groups[first] | {"root": runs[first].root, "answers": answers}


def collect_common_samples(runs: dict[str, Workdir], stage: str, title: str) -> JsonRow:
  """Returns prompts that more than one run answered at the same step of a stage."""
  by_prompt: dict[tuple[Any, ...], dict[str, list[JsonRow]]] = {}
  for name, run in runs.items():
    for step, path in list_sample_files(run.root / stage):
      for group in group_by_prompt(read_rows(path)):
        key = (
          step,
          *make_prompt_key(run, group[0] | {"truth": ""}, group[0]["prompt"]),
        )
        by_prompt.setdefault(key, {})[name] = group
  common = {key: by_run for key, by_run in by_prompt.items() if len(by_run) > 1}
  by_step: dict[int, list[JsonRow]] = {}
  for (step, *_), by_run in common.items():
    groups = by_step.setdefault(step, [])
    if len(groups) < MAX_PROMPTS // 2:
      groups.append(make_common_group(runs, step, by_run))
  groups = [group for each in by_step.values() for group in each]
  return make_source(stage, title, f"{stage}/samples", (groups, len(common)))


def make_common_group(
  runs: dict[str, Workdir], step: int, rows_by_run: dict[str, list[JsonRow]]
) -> JsonRow:
  """Returns the best answer of each run to a prompt."""
  first, (row, *_) = next(iter(rows_by_run.items()))
  answers = []
  for run, rows in rows_by_run.items():
    name = f"{run}, best of {len(rows)}" if len(rows) > 1 else run
    answers.append(make_sampled_group(rows, step)["answers"][0] | {"name": name})
  group = make_base_group(row, row["prompt"], step) | {"root": runs[first].root}
  return group | {"answers": answers, "in_order": True}
