"""The same prompts' answers of several runs beside each other, for the viewer."""

import functools
import hashlib
from pathlib import Path
from typing import Any, TypeAlias

from vlmrlaif_jax.core.stage_names import title
from vlmrlaif_jax.report.clips import Clips
from vlmrlaif_jax.report.files import clip, read_lines, sample_files
from vlmrlaif_jax.report.samples import fitted
from vlmrlaif_jax.report.sources import (
  PROMPTS,
  TEXT,
  base,
  finite,
  grouped,
  notes,
  policies,
  score_of,
  spread,
)
from vlmrlaif_jax.report.stages import RL

Row: TypeAlias = dict[str, Any]


def samples(runs: dict[str, Path], pairs: dict[str, tuple[str, str]]) -> Row:
  """The same prompts' answers beside each other, for the viewer."""
  sources = [held_out(runs, pairs), *(sampled(runs, name) for name in RL)]
  found = [source for source in sources if source["groups"]]
  return fitted(found, Clips()) | {"alarms": {}}


def held_out(runs: dict[str, Path], pairs: dict[str, tuple[str, str]]) -> Row:
  """Questions of the evaluation that more than one run was asked."""
  asked: dict[tuple[str, ...], dict[str, Row]] = {}
  for run, root in runs.items():
    for row in read_lines(root / "eval/answers.jsonl"):
      asked.setdefault(key_of(root, row, row["question"]), {})[run] = row
  both = [
    {"rows": rows, "kind": first_of(rows)["kind"], "marks": marks(rows, pairs)}
    for rows in asked.values()
    if len(rows) > 1
  ]
  unlike = [each for each in both if len(set(each["marks"])) > 1]
  chosen = spread(unlike, "marks", PROMPTS)
  chosen += spread([e for e in both if e not in unlike], "kind", PROMPTS - len(chosen))
  groups = [held_out_group(runs, pairs, each["rows"]) for each in chosen]
  name = {"name": "eval", "title": title("eval"), "file": "eval/answers.jsonl"}
  return {**name, "groups": groups, "total": len(both), "means": {}}


def key_of(root: Path, row: Row, question: str) -> tuple[str, ...]:
  """What makes two prompts the same: question and video, whatever they are called."""
  video = content(root / "world/videos" / (row.get("video") or ""))
  return row["id"], question, str(row.get("truth")), video


@functools.lru_cache(maxsize=None)
def content(path: Path) -> str:
  """What a file holds, in short; "" for none."""
  return hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else ""


def marks(rows: dict[str, Row], pairs: dict[str, tuple[str, str]]) -> tuple[Any, ...]:
  """Whether each run's last policy was right."""
  last = [row.get(pairs[run][1]) or {} for run, row in rows.items()]
  return tuple(answer.get("correct") for answer in last)


def first_of(found: dict[str, Any]) -> Any:
  """What the first of the runs has."""
  return next(iter(found.values()))


def held_out_group(
  runs: dict[str, Path], pairs: dict[str, tuple[str, str]], rows: dict[str, Row]
) -> Row:
  """What the two policies of each run answered; what is the same is told once."""
  first, row = next(iter(rows.items()))
  told: dict[tuple[str, str], Row] = {}
  for run, of in rows.items():
    for name, each in policies(of):
      if name in pairs[run]:
        answer = {"right": each.get("correct"), "notes": [], "by": []}
        told.setdefault((name, each["text"]), answer)["by"].append(run)
  answers = [
    {
      "name": f"{name.upper()} of {', '.join(answer.pop('by'))}",
      "text": clip(text, TEXT),
      **answer,
    }
    for (name, text), answer in sorted(
      told.items(), key=lambda item: item[0][0] != pairs[first][0]
    )
  ]
  made = base(row, row["question"], 0) | {"root": runs[first]}
  return made | {"answers": answers, "truth": clip(row["truth"]), "in_order": True}


def sampled(runs: dict[str, Path], stage: str) -> Row:
  """Prompts that more than one run answered at the same step of a stage."""
  asked: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
  for run, root in runs.items():
    for step, path in sample_files(root / stage):
      for group in grouped(read_lines(path)):
        key = (step, *key_of(root, group[0] | {"truth": ""}, group[0]["prompt"]))
        asked.setdefault(key, {})[run] = group
  both = {key: found for key, found in asked.items() if len(found) > 1}
  by_step: dict[int, int] = {}
  groups = []
  for (step, *_), found in both.items():
    by_step[step] = by_step.get(step, 0) + 1
    if by_step[step] <= PROMPTS // 2:
      groups.append(sampled_group(runs, step, found))
  name = {"name": stage, "title": title(stage), "file": f"{stage}/samples"}
  return {**name, "groups": groups, "total": len(both), "means": {}}


def sampled_group(runs: dict[str, Path], step: int, found: dict[str, list[Row]]) -> Row:
  """Each run's best answer."""
  first, rows = next(iter(found.items()))
  worth = lambda row: (row.get("valid", True), row["score"])
  best = {run: max(group, key=worth) for run, group in found.items()}
  answers = [
    {
      "name": f"{run}, best of {len(found[run])}" if len(found[run]) > 1 else run,
      "text": clip(row["response"], TEXT),
      "score": score_of(row),
      "kl": finite(row.get("kl")),
      "advantage": finite(row["advantage"]),
      "right": row.get("truth"),
      "notes": notes(row),
    }
    for run, row in best.items()
  ]
  made = base(rows[0], rows[0]["prompt"], step) | {"root": runs[first]}
  return made | {"answers": answers, "in_order": True}
