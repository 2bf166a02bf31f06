"""Reads the files that stages write, for the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlmrlaif_jax.core import files, jsonl
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.evals.summary import HELD_OUT, is_number, select_comparable


def read_json_or_empty(path: Path) -> JsonRow:
  """Returns the object in a JSON file, empty if there is no such file."""
  return files.read_json(path, default={})


def read_rows(path: Path) -> list[JsonRow]:
  """Returns the rows of a JSONL file, none if there is no such file."""
  return jsonl.read_jsonl(path) if path.exists() else []


class StageFacts(NamedTuple):
  """The content of stage.json, which a stage writes when it starts."""

  title: str  # Title with the round.
  has_rollouts: bool = False  # Whether its samples have scores.
  is_measurement: bool = False  # Whether it stands at the end of a report.
  started: float = 0.0  # Unix time in seconds.


def read_stage_facts(root: Path, name: str) -> StageFacts:
  """Returns the facts of a stage; without stage.json its title is its folder's name."""
  facts: JsonRow = {"title": name} | read_json_or_empty(root / name / "stage.json")
  return StageFacts(**facts)


def list_report_stages(root: Path) -> list[str]:
  """Returns the stages of a workdir in the order they started, measurements last."""
  written = ("stage.json", "metrics.jsonl", "done.json")
  names = {path.parent.name for file in written for path in root.glob(f"*/{file}")}
  facts = {name: read_stage_facts(root, name) for name in names}
  place = lambda name: (facts[name].is_measurement, facts[name].started, name)
  return sorted(names, key=place)


class Workdir(NamedTuple):
  """A workdir that is reported."""

  root: Path
  stages: list[str]  # Stages to show, in order.
  evaluation: str  # Name of the stage that compares policies, "" if there is none.
  results: (
    JsonRow  # Of held-out questions, from its results.json; empty if there is none.
  )
  pair: tuple[str, str]  # The two policies to compare.


def open_report_workdir(root: Path, stage: str = "") -> Workdir:
  """Returns a workdir with its evaluation: the results.json of held-out questions.

  Args:
    root: The folder.
    stage: The only stage to show, "" for all.
  """
  stages = [stage] if stage else list_report_stages(root)
  for name in stages:
    results = read_json_or_empty(root / name / "results.json").get(HELD_OUT)
    if results:
      return Workdir(
        root, stages, name, results, select_comparable(results["policies"])
      )
  return Workdir(root, stages, "", {}, ("", ""))


def list_sample_files(stage: Path) -> list[tuple[int, Path]]:
  """(step, file) of the answers that a stage sampled, in order."""
  paths = (stage / "samples").glob("step_*.jsonl")
  return sorted((int(path.stem.removeprefix("step_")), path) for path in paths)


def average_column(rows: Sequence[JsonRow], key: str) -> float | None:
  """Over the rows that have a number there, True being 1."""
  found = (row.get(key) for row in rows)
  values = [float(x) for x in found if isinstance(x, bool) or is_number(x)]
  return sum(values) / len(values) if values else None


def clip_text(text: object, length: int = 800) -> str:
  """The text, cut where it is longer than a page can bear."""
  text = str(text)
  return text if len(text) <= length else text[:length].rstrip() + " …"
