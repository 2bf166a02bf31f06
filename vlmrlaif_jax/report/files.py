"""Reads the files of stages, for the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlmrlaif_jax.core import files, jsonl
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.evals.summary import HELD_OUT, is_number, select_comparable


def read_json_or_empty(path: Path) -> JsonRow:
  """Returns the object in a JSON file, {} for a missing or damaged file."""
  try:
    value = files.read_json(path, default={})
  except ValueError as error:
    print(f"report: {error}: left out")
    return {}
  return value if isinstance(value, dict) else {}


def read_rows(path: Path) -> list[JsonRow]:
  """Returns the intact rows of a JSONL file, [] for a missing file."""
  if not path.exists():
    return []
  rows, damaged = jsonl.read_intact_rows(path)
  if damaged:
    print(f"report: {jsonl.format_damage(path, damaged)}: left out")
  return rows


class StageFacts(NamedTuple):
  """The content of stage.json, which a stage writes when it starts."""

  title: str  # Title with the round.
  has_rollouts: bool = False  # True if the stage writes scored samples.
  is_measurement: bool = False  # True if the report lists the stage at the end.
  started: float = 0.0  # Unix time in seconds.


def read_stage_facts(root: Path, name: str) -> StageFacts:
  """Returns the facts of a stage; without stage.json the title is the folder's name."""
  facts: JsonRow = {"title": name} | read_json_or_empty(root / name / "stage.json")
  return StageFacts(**{key: facts[key] for key in StageFacts._fields if key in facts})


def list_report_stages(root: Path) -> list[str]:
  """Returns the stages of a workdir in the order of their start, measurements last."""
  markers = ("stage.json", "metrics.jsonl", "done.json")
  names = {path.parent.name for file in markers for path in root.glob(f"*/{file}")}
  facts = {name: read_stage_facts(root, name) for name in names}
  get_order = lambda name: (facts[name].is_measurement, facts[name].started, name)
  return sorted(names, key=get_order)


class Workdir(NamedTuple):
  """A workdir with the results of its evaluation."""

  root: Path
  stages: list[str]  # Stages to show, in order.
  evaluation: str  # Name of the stage that compares policies, "" if there is none.
  results: JsonRow  # Results of held-out questions from results.json, {} for none.
  pair: tuple[str, str]  # The two policies to compare, ("", "") for none.


def open_report_workdir(root: Path, stage: str = "") -> Workdir:
  """Returns a workdir with its evaluation, the first stage with held-out results.

  Args:
    root: The folder.
    stage: Name of the only stage to show, "" for all.
  """
  stages = [stage] if stage else list_report_stages(root)
  for name in stages:
    results = read_json_or_empty(root / name / "results.json").get(HELD_OUT)
    if results:
      return Workdir(
        root, stages, name, results, select_comparable(results["policies"])
      )
  return Workdir(root, stages, "", {}, ("", ""))


def average_column(rows: Sequence[JsonRow], key: str) -> float | None:
  """Returns the mean of a column's numbers and booleans; None if it has none."""
  cells = (row.get(key) for row in rows)
  values = [float(x) for x in cells if isinstance(x, bool) or is_number(x)]
  return sum(values) / len(values) if values else None


def clip_text(text: object, length: int = 800) -> str:
  """Returns a text, cut to `length` characters."""
  text = str(text)
  return text if len(text) <= length else text[:length].rstrip() + " …"
