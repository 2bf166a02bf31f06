"""Collects a stage's time, summary, alarms and curves for the report."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import format_duration
from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.charts import draw_chart, select_evenly
from vlmrlaif_jax.report.files import (
  StageFacts,
  read_json_or_empty,
  read_rows,
  read_stage_facts,
)

Columns: TypeAlias = dict[str, list[tuple[int, float | int]]]  # Points by metric.

# For each word, the metric with the shortest name that contains it is shown first.
LEADING_METRICS = (
  *("reward", "kl", "length", "stop", "clip", "truth", "accuracy", "agreement"),
  *("kept", "loss", "margin", "entropy", "score", "judge"),
)
MAX_LEAD_CHARTS = 9  # Charts that are not folded.
ROW_LENGTH = 3  # Charts in a row.
SHARED_CHARTS = {  # Metrics that are useful only in the same chart.
  "reward of DPO": ("chosen_reward", "rejected_reward"),
  "log-probability": ("chosen_logps", "rejected_logps"),
}
TERM = re.compile(r"terms/([^/]+)(/weighted)?")  # Metrics of terms of the reward.
MAX_PHASES = 4  # Phases with a curve.
MAX_MARKS = 40  # Marks of alarms on a curve.


def collect_stage(root: Path, name: str) -> JsonRow:
  """Returns a stage's time, summary, alarms and curves.

  The summary is left out if the page shows all of it in tables.
  """
  folder, facts = root / name, read_stage_facts(root, name)
  done = read_json_or_empty(folder / "done.json")
  rows = read_rows(folder / "metrics.jsonl")
  alarms = read_rows(folder / "alarms.jsonl")
  charts, others = make_charts(facts, rows, make_marks(alarms))
  tables = [folder / file for file in ("rates.json", "results.json")]
  return {
    "name": name,
    "title": facts.title,
    "seconds": done.get("seconds"),
    "duration": format_time(done),
    "summary": {} if any(map(Path.exists, tables)) else done.get("summary"),
    "alarms": group_alarms(alarms),
    "alarm_steps": sorted({alarm["step"] for alarm in alarms}),
    "charts": charts,
    "others": others,
    "steps": rows[-1]["step"] if rows else 0,
    "phases": summarize_phases(rows),
    "selected": read_json_or_empty(folder / "selected.json"),
  }


def format_time(done: JsonRow) -> str:
  """Returns the duration of a stage, by its done.json."""
  return format_duration(done["seconds"]) if done else "not finished"


# Alarms.


def make_marks(alarms: Sequence[JsonRow]) -> list[tuple[int, str]]:
  """Returns (step, names of the alarms) of the marks on curves, one per step."""
  names_by_step: dict[int, list[str]] = {}
  for alarm in alarms:
    names_by_step.setdefault(alarm["step"], []).append(alarm["name"])
  marks = [
    (step, ", ".join(dict.fromkeys(names))) for step, names in names_by_step.items()
  ]
  return select_evenly(marks, MAX_MARKS)


def group_alarms(alarms: Sequence[JsonRow]) -> list[JsonRow]:
  """Returns each alarm once, with its first step, last step and count."""
  by_name: dict[str, JsonRow] = {}
  for alarm in alarms:
    entry = by_name.setdefault(alarm["name"], {"first": alarm["step"], "count": 0})
    entry |= alarm | {"count": entry["count"] + 1}
  return list(by_name.values())


# Curves.


def read_columns(rows: Sequence[JsonRow]) -> Columns:
  """Returns the points of each metric of metrics.jsonl."""
  keys = dict.fromkeys(key for row in rows for key in row)
  columns = {
    key: [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    for key in keys
    if key not in ("step", "time")
  }
  return {key: points for key, points in columns.items() if len(points) > 1}


def make_charts(
  facts: StageFacts,
  rows: Sequence[JsonRow],
  marks: Sequence[tuple[int, str]],
) -> tuple[list[JsonRow], list[JsonRow]]:
  """Returns the leading charts of a stage, and the others."""
  columns = read_columns(rows)
  term_charts = make_term_charts(columns, marks)
  columns = {key: each for key, each in columns.items() if not TERM.fullmatch(key)}
  charts = make_truth_chart(columns, marks) if facts.has_rollouts else []
  if charts:
    columns.pop("truth", None)
  for title, keys in SHARED_CHARTS.items():
    if all(key in columns for key in keys):
      lines = {key: columns.pop(key) for key in keys}
      charts.append(draw_chart(title, lines, shared=True, marks=marks))
  charts += term_charts
  draw = lambda key: draw_chart(key, {key: columns[key]}, marks=marks)
  leads = order_metrics(list(columns))[: max(MAX_LEAD_CHARTS - len(charts), 0)]
  others = [draw(key) for key in columns if key not in leads]
  return charts + [draw(key) for key in leads], others + make_phase_chart(rows)


def order_metrics(columns: Sequence[str]) -> list[str]:
  """Returns the leading metrics in the order of LEADING_METRICS, a row or more."""
  leading: list[str] = []
  for word in LEADING_METRICS:
    matches = [key for key in columns if word in key and key not in leading]
    leading += sorted(matches, key=len)[:1]
  rest = [key for key in columns if key not in leading]
  return leading + rest[: max(ROW_LENGTH - len(leading), 0)]


def make_truth_chart(
  columns: Columns, marks: Sequence[tuple[int, str]]
) -> list[JsonRow]:
  """Returns a chart of the judge's score and truth, which reward hacking separates."""
  find = lambda *words: next(
    (columns[key] for word in words for key in columns if word in key), None
  )
  lines = {"judge": find("judge_score", "score", "reward"), "truth": find("truth")}
  drawn = {name: points for name, points in lines.items() if points}
  return [draw_chart("judge and truth", drawn, marks=marks)] if len(drawn) == 2 else []


def make_term_charts(
  columns: Columns, marks: Sequence[tuple[int, str]]
) -> list[JsonRow]:
  """Returns a chart of the terms of the reward, and one of their weighted values."""
  charts = []
  titles = {None: "terms of the reward", "/weighted": "weighted terms of the reward"}
  for weighted, title in titles.items():
    matches = {key: TERM.fullmatch(key) for key in columns}
    lines = {
      match[1]: columns[key]
      for key, match in matches.items()
      if match and match[2] == weighted
    }
    if lines:
      charts.append(draw_chart(title, lines, shared=True, marks=marks))
  return charts


# Phases.


def summarize_phases(rows: Sequence[JsonRow]) -> list[JsonRow]:
  """Returns the seconds and the share of each phase of a stage.

  Args:
    rows: Rows of metrics.jsonl. The first is left out if others have phases, because it
      includes compilation.
  """
  timed = [row["phases"] for row in rows if "phases" in row]
  seconds: Counter[str] = Counter()
  for phases in timed[1:] or timed:
    seconds.update(phases)
  total = seconds.total() or 1
  return [
    {"name": name, "seconds": spent, "share": spent / total}
    for name, spent in seconds.most_common()
    if spent / total >= 0.005
  ]


def make_phase_chart(rows: Sequence[JsonRow]) -> list[JsonRow]:
  """Returns a chart of the longest phases, without the first step, which compiles."""
  timed = [row for row in rows if "phases" in row][1:]
  names = [phase["name"] for phase in summarize_phases(rows)][:MAX_PHASES]
  lines = {
    name: [(row["step"], row["phases"].get(name, 0.0)) for row in timed]
    for name in names
  }
  if len(timed) < 2:
    return []
  return [draw_chart("seconds by phase", lines, shared=True)]
