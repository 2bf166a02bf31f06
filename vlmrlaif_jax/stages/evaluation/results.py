"""Files, tables and messages with the scores of benchmarks."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.data import records
from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkScores, ScoredCase
from vlmrlaif_jax.evals.bootstrap import Interval, Resampling
from vlmrlaif_jax.evals.summary import (
  PLAIN,
  POINTS,
  TableLine,
  find_largest_n,
  make_measure_rows,
  select_comparable,
)
from vlmrlaif_jax.runtime import video
from vlmrlaif_jax.runtime.run import Run


def write_policy_result(
  folder: pathlib.Path,
  policy: Mapping[str, Any],
  scores: BenchmarkScores,
  recipe: Mapping[str, Any],
  problems: Sequence[SkippedRecord],
) -> None:
  """Writes rows.jsonl and scores.json of a policy.

  `policy` has its name and weights. `problems` are the questions without an answer.
  """
  result = {
    **policy,
    "scores": intervals_to_json(scores.values),
    "counts": scores.counts,
    "problems": [problem._asdict() for problem in problems],
    "recipe": recipe,
  }
  jsonl.write_records(folder / "rows.jsonl", [row._asdict() for row in scores.rows])
  write_json(folder / "scores.json", result)


def summarize_coverage(
  scores: BenchmarkScores, problems: Sequence[SkippedRecord]
) -> str:
  """Returns the number of cases, the number of each fault, and the problems by id."""
  counts = dict(scores.counts)
  cases = counts.pop("cases")
  faults = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
  line = f"eval: {cases} cases" + (f", of which {faults}" if faults else "")
  if counts["unjudged"]:
    line += (
      "\neval: unjudged cases have no reply: the server failed, or the prompt is "
      "longer than evaluate.judge_prompt_len; to retry, remove eval/done.json"
    )
  if not problems:
    return line
  return f"{line}\n{records.format_skipped_records(problems, total=cases)}"


def explain_no_answers(
  name: str,
  policies: Mapping[str, BenchmarkScores],
  problems: Sequence[SkippedRecord],
) -> str:
  """Returns why a benchmark has no answer of any policy, "" if it has one.

  Args:
    name: Name of the benchmark.
    policies: Scores by policy.
    problems: The questions without an answer.
  """
  rows = [row for each in policies.values() for row in each.rows]
  if any(row.fault != "unanswered" for row in rows):
    return ""
  cases = len(next(iter(policies.values())).rows)
  first = f", for example {problems[0].id}: {problems[0].reason}" if problems else ""
  return (
    f"none of the {cases} questions of the benchmark {name} was answered{first}. "
    f"Correct --config.evaluate.{name}, or remove {name} from --config.evaluate.names"
  )


def make_benchmark_result(
  policies: Mapping[str, BenchmarkScores], resampling: Resampling
) -> JsonRow:
  """Returns the entry of a benchmark in results.json.

  Args:
    policies: Scores by policy.
    resampling: Bootstrap of the differences.

  Returns:
    "pair": the two compared policies. "policies" and "difference": measures with
    intervals. "counts": cases and faults by policy. "questions": the number that the
    first policy answered. "videos": the number of their videos.
  """
  before, after = pair = select_comparable(policies)
  first, second = (
    [row._asdict() for row in policies[name].rows] for name in (before, after)
  )
  changes = {}
  if before != after:
    compute_difference = functools.partial(
      bootstrap.compute_paired_difference, first, second, resampling=resampling
    )
    changes = {
      measure: compute_difference(measure) for measure in policies[after].values
    }
  answered = [row for row in policies[before].rows if row.fault != "unanswered"]
  return {
    "pair": pair,
    "policies": {
      name: intervals_to_json(each.values) for name, each in policies.items()
    },
    "difference": intervals_to_json(
      {name: x for name, x in changes.items() if x is not None}
    ),
    "counts": {name: each.counts for name, each in policies.items()},
    "questions": len(answered),
    "videos": len({row.video for row in answered}),
  }


def intervals_to_json(values: Mapping[str, Interval]) -> JsonRow:
  """Returns intervals as JSON."""
  return {name: value._asdict() for name, value in values.items()}


def merge_policy_rows(
  run: Run, policies: Mapping[str, list[ScoredCase]]
) -> list[JsonRow]:
  """Returns a row for each held-out question with all policies' answers, for reports.

  Questions without an answer of each policy are left out.
  """
  videos = {e["id"]: video.get_report_path(run, e) for e in run.splits.benchmark}
  merged = []
  for rows in zip(*policies.values(), strict=True):
    if all(row.details for row in rows):
      cases = dict(zip(policies, rows, strict=True))
      first = rows[0]
      merged.append(
        {
          "id": first.id,
          "video": videos[first.id],
          "kind": first.details["kind"],
          "question": first.details["question"],
          "truth": first.right,
          **{name: row.details for name, row in cases.items()},
          "reward": {name: row.values.get("reward") for name, row in cases.items()},
        }
      )
  return merged


def format_result(result: JsonRow, shares: Sequence[str] = ()) -> list[JsonRow]:
  """Returns a row for each measure and fault: values by policy, and the difference.

  Args:
    result: Entry of results.json.
    shares: Measures in per cent, in addition to accuracies. "f1" includes
      "existence.f1".
  """
  policies, counts = result["policies"], result["counts"]
  names = dict.fromkeys(name for stats in policies.values() for name in stats)
  is_share = lambda name: "accuracy" in name or name.split(".")[-1] in shares
  lines = [TableLine(name, name, POINTS if is_share(name) else PLAIN) for name in names]
  # A terminal has room for the intervals of three policies. With more policies, only
  # the compared pair has intervals.
  has_intervals = lambda name: len(policies) < 4 or name in result["pair"]
  means = lambda stats: {key: {"mean": stat["mean"]} for key, stat in stats.items()}
  columns = {
    name: stats if has_intervals(name) else means(stats)
    for name, stats in policies.items()
  }
  if len(policies) > 1:
    columns["difference"] = result["difference"]
  rows = make_measure_rows(lines, columns)
  get_largest_n = lambda name: find_largest_n(
    each.get(name, {}) for each in policies.values()
  )
  return [
    *(
      row | {"n": str(get_largest_n(name))}
      for row, name in zip(rows, names, strict=True)
    ),
    *(
      {"measure": name, **dict.fromkeys(columns, "")}
      | {policy: str(each[name]) for policy, each in counts.items()}
      | {"n": ""}
      for name in ("cases", *protocol.FAULTS)
      if any(each[name] for each in counts.values())
    ),
  ]
