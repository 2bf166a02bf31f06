"""The same prompts' answers of several runs beside each other, for the viewer."""

import functools
import hashlib
from pathlib import Path
from typing import Any

from vlmrlaif_jax.report.files import (
  Row,
  Workdir,
  clip,
  read_lines,
  sample_files,
  stage_facts,
)
from vlmrlaif_jax.report.samples import fitted
from vlmrlaif_jax.report.sources import (
  PROMPTS,
  TEXT,
  answer_of,
  base,
  grouped,
  policies,
  spread,
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
    *(sampled(runs, name, title) for name, title in titles.items()),
  ]
  return fitted([each for each in sources if each["groups"]]) | {"alarms": {}}


def held_out(runs: dict[str, Workdir]) -> Row:
  """Returns the questions of the evaluation that more than one run was asked."""
  asked: dict[tuple[str, ...], dict[str, Row]] = {}
  for name, run in runs.items():
    for row in read_lines(run.root / run.evaluation / "answers.jsonl"):
      asked.setdefault(key_of(run, row, row["question"]), {})[name] = row
  both = [
    {"rows": rows, "kind": first_of(rows)["kind"], "marks": marks(rows, runs)}
    for rows in asked.values()
    if len(rows) > 1
  ]
  if not both:
    return {"groups": []}
  unlike = [each for each in both if len(set(each["marks"])) > 1]
  chosen = spread(unlike, lambda each: each["marks"], PROMPTS)
  alike = [each for each in both if each not in unlike]
  chosen += spread(alike, lambda each: each["kind"], PROMPTS - len(chosen))
  groups = [held_out_group(runs, each["rows"]) for each in chosen]
  first = first_of(runs)
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
  """What a file holds, in short; "" for none."""
  return hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else ""


def marks(rows: dict[str, Row], runs: dict[str, Workdir]) -> tuple[Any, ...]:
  """Returns whether each run's last policy was right."""
  last = [row.get(runs[name].pair[1]) or {} for name, row in rows.items()]
  return tuple(answer.get("correct") for answer in last)


def first_of(found: dict[str, Any]) -> Any:
  """What the first of the runs has."""
  return next(iter(found.values()))


def held_out_group(runs: dict[str, Workdir], rows: dict[str, Row]) -> Row:
  """Returns the answers of the two policies of each run, equal ones once."""
  first, row = next(iter(rows.items()))
  told: dict[tuple[str, str], Row] = {}
  for run, of in rows.items():
    for name, each in policies(of):
      if name in runs[run].pair:
        answer: Row = {"right": each.get("correct"), "notes": [], "by": []}
        told.setdefault((name, each["text"]), answer)["by"].append(run)
  answers = [
    {
      "name": f"{name.upper()} of {', '.join(answer.pop('by'))}",
      "text": clip(text, TEXT),
      **answer,
    }
    for (name, text), answer in sorted(
      told.items(), key=lambda item: item[0][0] != runs[first].pair[0]
    )
  ]
  made = base(row, row["question"], 0) | {"root": runs[first].root}
  return made | {"answers": answers, "truth": clip(row["truth"]), "in_order": True}


def sampled(runs: dict[str, Workdir], stage: str, title: str) -> Row:
  """Returns prompts that more than one run answered at the same step of a stage."""
  asked: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
  for name, run in runs.items():
    for step, path in sample_files(run.root / stage):
      for group in grouped(read_lines(path)):
        key = (step, *key_of(run, group[0] | {"truth": ""}, group[0]["prompt"]))
        asked.setdefault(key, {})[name] = group
  both = {key: found for key, found in asked.items() if len(found) > 1}
  by_step: dict[int, int] = {}
  groups = []
  for (step, *_), found in both.items():
    by_step[step] = by_step.get(step, 0) + 1
    if by_step[step] <= PROMPTS // 2:
      groups.append(sampled_group(runs, step, found))
  return source(stage, title, "samples", groups, len(both))


def sampled_group(
  runs: dict[str, Workdir], step: int, found: dict[str, list[Row]]
) -> Row:
  """Returns each run's best answer."""
  first, rows = next(iter(found.items()))
  worth = lambda row: (row.get("valid", True), row["score"])
  best = {run: max(group, key=worth) for run, group in found.items()}
  answers = [
    {
      "name": f"{run}, best of {len(found[run])}" if len(found[run]) > 1 else run,
      **answer_of(row),
    }
    for run, row in best.items()
  ]
  made = base(rows[0], rows[0]["prompt"], step) | {"root": runs[first].root}
  return made | {"answers": answers, "in_order": True}
