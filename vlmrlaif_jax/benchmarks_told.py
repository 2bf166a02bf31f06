"""What the stage `benchmarks` tells of its scores: in files, in words, as a table."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from vlmrlaif_jax.data import records
from vlmrlaif_jax.data.records import Problem
from vlmrlaif_jax.evals import amber, benchmark
from vlmrlaif_jax.evals.benchmark import Scores
from vlmrlaif_jax.log import replace_text
from vlmrlaif_jax.report_results import say

# Measures that are shares of 1; "existence.accuracy" is one as well.
SHARES = (
  "accuracy",
  "precision",
  "recall",
  "f1",
  "chair_s",
  "chair_i",
  "hallucination",
  *amber.SHARES,
)


def result(
  scores: Scores, recipe: dict[str, Any], problems: Sequence[Problem]
) -> dict[str, Any]:
  """What scores.json holds beside the policy's name."""
  return {
    "scores": {name: value._asdict() for name, value in scores.values.items()},
    "counts": scores.counts,
    "problems": [problem._asdict() for problem in problems],
    "recipe": recipe,
  }


def write(folder: pathlib.Path, told: dict[str, Any], rows) -> None:
  records.write_records(folder / "rows.jsonl", [row._asdict() for row in rows])
  replace_text(folder / "scores.json", json.dumps(told, indent=2))


def said_of(scores: Scores, problems: Sequence[Problem]) -> str:
  """How much was measured, and what was not, by id."""
  counts = dict(scores.counts)
  cases = counts.pop("cases")
  faults = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
  line = f"benchmarks: {cases} cases" + (f", of which {faults}" if faults else "")
  if counts["unjudged"]:
    line += (
      "\nbenchmarks: no reply came of a server that failed, or to a prompt longer than "
      "benchmarks.judge_prompt_len; to ask again, remove benchmarks/done.json"
    )
  if not problems:
    return line
  return f"{line}\n{records.report_problems(problems, total=cases)}"


def table(found: dict[str, Scores]) -> list[dict[str, str]]:
  """A row for each measure, with what each policy has."""
  measures = dict.fromkeys(name for scores in found.values() for name in scores.values)
  share = lambda name: "accuracy" in name or name.split(".")[-1] in SHARES
  shown = lambda scores, name: (
    say(scores.values[name]._asdict(), 100 if share(name) else 1, "")
    if name in scores.values
    else "not measured"
  )
  rows = [
    {"measure": name}
    | {policy: shown(scores, name) for policy, scores in found.items()}
    for name in measures
  ]
  faults = ("cases", *benchmark.FAULTS)
  return rows + [
    {"measure": name} | {policy: str(s.counts[name]) for policy, s in found.items()}
    for name in faults
    if any(scores.counts[name] for scores in found.values())
  ]
