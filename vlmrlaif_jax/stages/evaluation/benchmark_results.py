"""What the stage `benchmarks` tells of its scores: in files, in words, as a table."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.files import replace_text, write_json
from vlmrlaif_jax.data import records
from vlmrlaif_jax.data.records import Problem
from vlmrlaif_jax.evals import paired_difference
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.benchmarks.protocol import Scores
from vlmrlaif_jax.evals.bootstrap import Interval
from vlmrlaif_jax.evals.summary import PLAIN, POINTS, Line, compared, measure_rows


def result(
  scores: Scores, recipe: dict[str, Any], problems: Sequence[Problem]
) -> dict[str, Any]:
  """What scores.json holds beside the policy's name."""
  return {
    "scores": _stats(scores.values),
    "counts": scores.counts,
    "problems": [problem._asdict() for problem in problems],
    "recipe": recipe,
  }


def write(folder: pathlib.Path, told: dict[str, Any], rows) -> None:
  jsonl.write_records(folder / "rows.jsonl", [row._asdict() for row in rows])
  write_json(folder / "scores.json", told)


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


def write_all(path: pathlib.Path, found: dict[str, dict[str, Scores]]) -> None:
  """One file of all benchmarks: what is needed to draw any of it again.

  {NAME: {"pair": two policies, "policies": {POLICY: {"scores", "counts"}},
  "difference": {MEASURE: of the pair's second from its first}, "cases": {POLICY:
  [{"id", "video", "values": {MEASURE: value}, "weights": {MEASURE: if not 1}}, ...]}}}
  A score is sum(value * weight) / sum(weight); cases of one video go together.
  """
  told = {
    name: {
      "pair": compared(policies),
      "policies": {
        policy: {
          "scores": _stats(scores.values),
          "counts": scores.counts,
        }
        for policy, scores in policies.items()
      },
      "difference": _stats(differences(policies)),
      "cases": {policy: _cases(scores) for policy, scores in policies.items()},
    }
    for name, policies in found.items()
  }
  replace_text(path, json.dumps(told))


def _cases(scores: Scores) -> list[dict[str, Any]]:
  return [
    {"id": row.id, "video": os.path.basename(row.video), "values": row.values}
    | ({"weights": row.weights} if row.weights else {})
    for row in scores.rows
  ]


def differences(policies: dict[str, Scores]) -> dict[str, Interval]:
  """By how much each measure is higher of the second policy that is compared."""
  before, after = compared(policies)
  if before == after:
    return {}
  first, second = (
    [row._asdict() for row in policies[name].rows] for name in (before, after)
  )
  found = {
    name: paired_difference.difference(first, second, name)
    for name in policies[after].values
  }
  return {name: change for name, change in found.items() if change is not None}


def table(
  policies: dict[str, Scores], shares: Sequence[str] = ()
) -> list[dict[str, str]]:
  """Returns a row for each measure and fault: each policy's, and the difference.

  Args:
    policies: scores by policy.
    shares: measures that are shown in per cent, besides those named for accuracy; "f1"
      includes "existence.f1".
  """
  measures = dict.fromkeys(name for each in policies.values() for name in each.values)
  share = lambda name: "accuracy" in name or name.split(".")[-1] in shares
  lines = [Line(name, (name,), POINTS if share(name) else PLAIN) for name in measures]
  columns = {policy: _stats(each.values) for policy, each in policies.items()}
  if len(policies) > 1:
    columns["difference"] = _stats(differences(policies))
  empty = dict.fromkeys(columns, "")
  faults = ("cases", *protocol.FAULTS)
  return measure_rows(lines, columns) + [
    {"measure": name}
    | empty
    | {policy: str(each.counts[name]) for policy, each in policies.items()}
    for name in faults
    if any(each.counts[name] for each in policies.values())
  ]


def _stats(values: dict[str, Interval]) -> dict[str, Any]:
  return {name: value._asdict() for name, value in values.items()}
