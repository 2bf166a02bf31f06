"""The report of a run: one self-contained HTML page, made from what the stages wrote.

launch/report.py WORKDIR writes WORKDIR/report.html. A run that is still going, or was
cut short, gets a page that says what is missing.
"""

import json
import os
from collections import Counter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from vlmrlaif_jax.core.files import replace_text
from vlmrlaif_jax.core.stage_log import duration, number
from vlmrlaif_jax.report.files import (
  Row,
  Workdir,
  clip,
  open_workdir,
  read_json,
  read_lines,
  sample_files,
  stage_facts,
  stages_there,
)
from vlmrlaif_jax.report.samples import viewer
from vlmrlaif_jax.report.stages import stage_view
from vlmrlaif_jax.report.tables import (
  benchmarks_view,
  comparison,
  judges_view,
  labels_view,
  verdict,
)

OUTCOMES = {  # By whether the answer was right before and after.
  (False, True): "mended",
  (True, False): "broken",
  (True, True): "right both times",
  (False, False): "wrong both times",
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
  shown = view(open_workdir(root, stage))
  if stage:
    title = stage_facts(root, stage).title
    shown |= {"name": f"{shown['name']}: {title}", "one": True}
  return write_page("page.html.j2", shown, Path(out or root / stage / "report.html"))


def write_page(template: str, shown: Row, path: Path) -> Path:
  """Renders a template, replaces a page with it atomically and returns its path."""
  pages = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  pages.filters |= {
    "clip": clip,
    "count": "{:,}".format,
    "number": lambda x: number(float(x)),
    "percent": lambda share: f"{100 * share:.1f} %",
  }
  pages.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
  page = pages.get_template(template).render(shown)
  path.parent.mkdir(parents=True, exist_ok=True)
  replace_text(path, page)
  return path


def view(workdir: Workdir) -> Row:
  """Returns all that the template shows."""
  root, stages, (before, after) = workdir.root, workdir.stages, workdir.pair
  shown = [stage_view(root, name) for name in stages]
  seconds = [stage["seconds"] for stage in shown if stage["seconds"] is not None]
  config = read_json(root / "config.json")
  samples = viewer(root, stages)
  return {
    "name": root.resolve().name,
    "one": False,
    "before": before,
    "after": after,
    "verdict": verdict(workdir),
    "missing": missing(root),
    "comparison": [row[""] for row in comparison({"": workdir})],
    "outcomes": outcomes(workdir),
    "labels": labels_view(root, stages),
    "judges": [table for name in stages for table in judges_view(root / name)],
    "benchmarks": benchmarks_view({"": workdir}),
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
  """Returns what the page lacks of the stages that the config lists."""
  config = read_json(root / "config.json")
  lacks = [] if config else ["config.json: no such file"]
  for name in config.get("stages", []):
    if not (root / name).is_dir():
      lacks.append(f"{name}: has not run")
    elif not (root / name / "done.json").exists():
      lacks.append(f"{name}: has not finished (no {name}/done.json)")
    elif stage_facts(root, name).has_rollouts and not sample_files(root / name):
      lacks.append(f"{name}/samples: has no sampled answers")
  return lacks


def outcomes(run: Workdir) -> dict[str, int]:
  """Returns how many answers were mended, broken, right or wrong both times."""
  marks = Counter(
    tuple((row.get(name) or {}).get("correct") for name in run.pair)
    for row in read_lines(run.root / run.evaluation / "answers.jsonl")
  )
  counts = {said: marks[pair] for pair, said in OUTCOMES.items()}
  return counts if any(counts.values()) else {}
