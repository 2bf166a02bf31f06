"""The same prompts' answers of several runs side by side, for the viewer."""

import functools
import hashlib
from pathlib import Path
from typing import Any

from vlmrlaif_jax.report.files import (
  Row,
  Workdir,
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
  varied,
)


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
  return source(first.evaluation, title, "answers.jsonl", groups, len(both))


def source(name: str, title: str, file: str, groups: list[Row], total: int) -> Row:
  """Returns a source of the viewer."""
  place = {"name": name, "title": title, "file": f"{name}/{file}"}
  return place | {"groups": groups, "total": total, "means": {}}


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
  return source(stage, title, "samples", groups, len(both))


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
