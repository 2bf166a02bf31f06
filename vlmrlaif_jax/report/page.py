"""The report of a run: one self-contained HTML page, made from what the stages wrote.

launch/report.py WORKDIR writes WORKDIR/report.html. A run that is still going, or was
cut short, gets a page that says what is missing.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader

from vlmrlaif_jax.core.stage_log import duration, number
from vlmrlaif_jax.core.stage_names import STAGES, title
from vlmrlaif_jax.evals.summary import compared
from vlmrlaif_jax.report.clips import Clips
from vlmrlaif_jax.report.files import clip, read_json, read_lines
from vlmrlaif_jax.report.labels import labels_view
from vlmrlaif_jax.report.samples import viewer
from vlmrlaif_jax.report.stages import stage_view, stages_there
from vlmrlaif_jax.report.tables import benchmarks_view, judges_view
from vlmrlaif_jax.report.verdict import comparison, verdict

Row: TypeAlias = dict[str, Any]

RL = ("ppo", "grpo")
FILES = {  # What the page is made of, beside metrics.jsonl and done.json.
  "config.json": "the config",
  "label/rates.json": "how often the judge decided",
  "label/blocks": "the pairs put before the judge",
  **{f"{name}/samples": f"the answers sampled during {name.upper()}" for name in RL},
  "eval/results.json": "the measured accuracy",
  "eval/answers.jsonl": "the answers of the evaluation",
}
TEMPLATES = Path(__file__).parents[1] / "assets" / "report"


def write_report(
  workdir: str | os.PathLike[str],
  *,
  stage: str = "",
  out: str | os.PathLike[str] | None = None,
) -> Path:
  """Writes the report of a run, and returns its path.

  Args:
    stage: of which alone to tell; "": of all.
    out: the file; None: report.html in the workdir, or in the stage's folder.
  """
  root = Path(workdir)
  if not root.is_dir():
    raise FileNotFoundError(f"no such folder: {root}; give the workdir of a run")
  there = stages_there(root)
  if stage and stage not in there:
    raise FileNotFoundError(f"{root} has no stage {stage!r}: it has {', '.join(there)}")
  shown = view(root, [stage] if stage else there)
  if stage:
    shown |= {"name": f"{shown['name']}: {title(stage)}", "one": True}
  return write_page("page.html.j2", shown, Path(out or root / stage / "report.html"))


def write_page(template: str, shown: Row, path: Path) -> Path:
  """Writes a page whole or not at all."""
  pages = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  pages.filters |= {"clip": clip, "number": lambda x: number(float(x))}
  pages.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
  page = pages.get_template(template).render(shown)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f"{path.name}.part")
  part.write_text(page, encoding="utf-8")
  return part.replace(path)


def view(root: Path, stages: Sequence[str]) -> Row:
  """All that the template shows.

  Args:
    stages: of the workdir, to be shown.
  """
  has = lambda name: name in stages
  results = read_json(root / "eval/results.json") if has("eval") else {}
  answers = read_lines(root / "eval/answers.jsonl") if has("eval") else []
  before, after = compared(results["policies"]) if results else ("sft", "ppo")
  shown = [stage_view(root, name) for name in stages]
  seconds = [stage["seconds"] for stage in shown if stage["seconds"] is not None]
  config = read_json(root / "config.json")
  samples = viewer(root, stages, Clips())
  return {
    "name": root.resolve().name,
    "one": False,
    "before": before,
    "after": after,
    "verdict": verdict(results, before, after),
    "missing": missing(root),
    "comparison": comparison(results, before, after) if results else [],
    "outcomes": outcomes(answers, before, after),
    "labels": [each for each in labels_view(root) if has(each["stage"])],
    "judges": judges_view(root) if has("judges") else [],
    "benchmarks": benchmarks_view(root) if has("benchmarks") else [],
    "stages": shown,
    "sampled": [source["name"] for source in samples["sources"]],
    "total": duration(sum(seconds)) if seconds else "",
    "longest": max(seconds, default=1) or 1,
    "samples": samples
    | {"alarms": {s["name"]: s["alarm_steps"] for s in shown if s["alarms"]}},
    "checkpoints": read_json(root / "checkpoints.json"),
    "config": json.dumps(config, indent=2) if config else "",
  }


def missing(root: Path) -> list[str]:
  """What the page cannot show, in words, of the stages that the recipe has."""
  said = []
  for name in read_json(root / "config.json").get("stages", STAGES):
    if not (root / name).is_dir():
      said.append(f"{name}: has not run")
    elif not (root / name / "done.json").exists():
      said.append(f"{name}: has not finished (no {name}/done.json)")
  return said + [
    f"{name}: no such file ({meaning})"
    for name, meaning in FILES.items()
    if (root / name).parent.is_dir() and not (root / name).exists()
  ]


def outcome(row: Row, before: str, after: str) -> str | None:
  """What became of the answer; None where truth does not say."""
  marks = [(row.get(name) or {}).get("correct") for name in (before, after)]
  names = {
    (False, True): "mended",
    (True, False): "broken",
    (True, True): "right both times",
    (False, False): "wrong both times",
  }
  return names.get((marks[0], marks[1]))


def outcomes(answers: Sequence[Row], before: str, after: str) -> dict[str, int]:
  """How many answers were mended, broken, right or wrong both times."""
  found = [outcome(row, before, after) for row in answers]
  names = ["mended", "broken", "right both times", "wrong both times"]
  counts = {name: found.count(name) for name in names}
  return counts if any(counts.values()) else {}
