"""A stage as the report shows it: its time, summary, alarms and curves."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from vlmrlaif_jax.core.stage_log import duration
from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.charts import chart, even
from vlmrlaif_jax.report.files import (
  Row,
  StageFacts,
  read_json,
  read_lines,
  stage_facts,
)

Columns: TypeAlias = dict[str, list[tuple[int, float | int]]]  # Points by metric.

# Of each word the metric that has it and the shortest name is shown first.
LEAD = (
  *("reward", "kl", "length", "stop", "clip", "truth", "accuracy", "agreement"),
  *("kept", "loss", "margin", "entropy", "score", "judge"),
)
LEAD_CHARTS, ROW = 9, 3
TOGETHER = {  # Metrics that say something beside each other alone.
  "reward of DPO": ("chosen_reward", "rejected_reward"),
  "log-probability": ("chosen_logps", "rejected_logps"),
}
PHASES = 4  # That have a curve.
MARKS = 40  # Alarms marked on a curve.


def stage_view(root: Path, name: str) -> Row:
  """Returns a stage's time, summary, alarms and curves.

  The summary is left out where the page shows all of it as tables.
  """
  folder, facts = root / name, stage_facts(root, name)
  done = read_json(folder / "done.json")
  rows = read_lines(folder / "metrics.jsonl")
  alarms = read_lines(folder / "alarms.jsonl")
  charts, others = charts_of(facts, rows, marks_of(alarms))
  tables = [folder / file for file in ("rates.json", "results.json")]
  return {
    "name": name,
    "title": facts.title,
    "seconds": done.get("seconds"),
    "duration": time_of(done),
    "summary": {} if any(map(Path.exists, tables)) else done.get("summary"),
    "alarms": alarms_by_name(alarms),
    "alarm_steps": sorted({alarm["step"] for alarm in alarms}),
    "charts": charts,
    "others": others,
    "steps": rows[-1]["step"] if rows else 0,
    "phases": phases_of(rows),
    "selected": read_json(folder / "selected.json"),
  }


def time_of(done: Row) -> str:
  """Returns how long a stage took, by its done.json."""
  return duration(done["seconds"]) if done else "not finished"


# Alarms.


def marks_of(alarms: Sequence[Row]) -> list[tuple[int, str]]:
  """(step, what was wrong) of the alarms, for curves: a mark a step."""
  said: dict[int, list[str]] = {}
  for alarm in alarms:
    said.setdefault(alarm["step"], []).append(alarm["name"])
  marks = [(step, ", ".join(dict.fromkeys(names))) for step, names in said.items()]
  return even(marks, MARKS)


def alarms_by_name(alarms: Sequence[Row]) -> list[Row]:
  """Each alarm once: when it first rang, when last, how often, and what to do."""
  found: dict[str, Row] = {}
  for alarm in alarms:
    known = found.setdefault(alarm["name"], {"first": alarm["step"], "count": 0})
    known |= alarm | {"count": known["count"] + 1}
  return list(found.values())


# Curves.


def columns_of(rows: Sequence[Row]) -> Columns:
  """Returns the curves of metrics.jsonl."""
  keys = dict.fromkeys(key for row in rows for key in row)
  columns = {
    key: [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    for key in keys
    if key not in ("step", "time")
  }
  return {key: points for key, points in columns.items() if len(points) > 1}


def charts_of(
  facts: StageFacts,
  rows: Sequence[Row],
  marks: Sequence[tuple[int, str]],
) -> tuple[list[Row], list[Row]]:
  """(the charts of a stage that come first, the others)."""
  columns = columns_of(rows)
  charts = truth_chart(columns, marks) if facts.has_rollouts else []
  if charts:
    columns.pop("truth", None)
  for said, keys in TOGETHER.items():
    if all(key in columns for key in keys):
      lines = {key: columns.pop(key) for key in keys}
      charts.append(chart(said, lines, shared=True, marks=marks))
  one = lambda key: chart(key, {key: columns[key]}, marks=marks)
  leads = lead_first(list(columns))[: max(LEAD_CHARTS - len(charts), 0)]
  others = [one(key) for key in columns if key not in leads]
  return charts + [one(key) for key in leads], others + phase_chart(rows)


def lead_first(columns: Sequence[str]) -> list[str]:
  """The metrics that are shown first, in the order of LEAD; a row of them at least."""
  found: list[str] = []
  for word in LEAD:
    having = [key for key in columns if word in key and key not in found]
    found += sorted(having, key=len)[:1]
  rest = [key for key in columns if key not in found]
  return found + rest[: max(ROW - len(found), 0)]


def truth_chart(columns: Columns, marks: Sequence[tuple[int, str]]) -> list[Row]:
  """Returns a chart of the judge's score and truth, which reward hacking parts."""
  found = lambda *words: next(
    (columns[key] for word in words for key in columns if word in key), None
  )
  lines = {"judge": found("judge_score", "score", "reward"), "truth": found("truth")}
  drawn = {name: points for name, points in lines.items() if points}
  return [chart("judge and truth", drawn, marks=marks)] if len(drawn) == 2 else []


# Phases.


def phases_of(rows: Sequence[Row]) -> list[Row]:
  """What took how long in a stage: each phase with its seconds and its share.

  Args:
    rows: of metrics.jsonl. The first is left out if others have phases, too: it holds
      the compiling.
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


def phase_chart(rows: Sequence[Row]) -> list[Row]:
  """The seconds of what takes longest, by step; the first step compiles."""
  timed = [row for row in rows if "phases" in row][1:]
  names = [phase["name"] for phase in phases_of(rows)][:PHASES]
  lines = {
    name: [(row["step"], row["phases"].get(name, 0.0)) for row in timed]
    for name in names
  }
  if len(timed) < 2:
    return []
  return [chart("seconds by phase", lines, shared=True)]
