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
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import format_duration, format_number
from vlmrlaif_jax.report.files import (
  Workdir,
  clip_text,
  list_report_stages,
  list_sample_files,
  open_report_workdir,
  read_json_or_empty,
  read_rows,
  read_stage_facts,
)
from vlmrlaif_jax.report.samples import collect_viewer
from vlmrlaif_jax.report.stages import collect_stage
from vlmrlaif_jax.report.tables import (
  collect_benchmarks,
  collect_judges,
  collect_label_rates,
  compare_all_policies,
  format_verdict,
)

ANSWER_OUTCOMES = {  # By whether the answer was right before and after.
  (False, True): "mended",
  (True, False): "broken",
  (True, True): "right both times",
  (False, False): "wrong both times",
}
TEMPLATE_FOLDER = Path(__file__).parents[1] / "assets" / "report"


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
  there = list_report_stages(root)
  if stage and stage not in there:
    raise FileNotFoundError(f"{root} has no stage {stage!r}: it has {', '.join(there)}")
  shown = collect_report(open_report_workdir(root, stage))
  if stage:
    title = read_stage_facts(root, stage).title
    shown |= {"name": f"{shown['name']}: {title}", "one": True}
  return write_page("page.html.j2", shown, Path(out or root / stage / "report.html"))


def write_page(template: str, shown: JsonRow, path: Path) -> Path:
  """Renders a template, replaces a page with it atomically and returns its path."""
  pages = Environment(
    loader=FileSystemLoader(TEMPLATE_FOLDER),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  pages.filters |= {
    "clip": clip_text,
    "count": "{:,}".format,
    "number": lambda x: format_number(float(x)),
    "percent": lambda share: f"{100 * share:.1f} %",
  }
  pages.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
  page = pages.get_template(template).render(shown)
  path.parent.mkdir(parents=True, exist_ok=True)
  replace_text(path, page)
  return path


def collect_report(workdir: Workdir) -> JsonRow:
  """Returns all that the template shows."""
  root, stages, (before, after) = workdir.root, workdir.stages, workdir.pair
  shown = [collect_stage(root, name) for name in stages]
  seconds = [stage["seconds"] for stage in shown if stage["seconds"] is not None]
  config = read_json_or_empty(root / "config.json")
  samples = collect_viewer(root, stages)
  return {
    "name": root.resolve().name,
    "one": False,
    "before": before,
    "after": after,
    "verdict": format_verdict(workdir),
    "missing": find_missing(root),
    "comparison": [row[""] for row in compare_all_policies({"": workdir})],
    "outcomes": count_outcomes(workdir),
    "labels": collect_label_rates(root, stages),
    "judges": [table for name in stages for table in collect_judges(root / name)],
    "benchmarks": collect_benchmarks({"": workdir}),
    "stages": shown,
    "sampled": [source["name"] for source in samples["sources"]],
    "total": format_duration(sum(seconds)) if seconds else "",
    "longest": max(seconds, default=1) or 1,
    "samples": samples
    | {"alarms": {s["name"]: s["alarm_steps"] for s in shown if s["alarms"]}},
    "checkpoints": read_json_or_empty(root / "checkpoints.json"),
    "config": json.dumps(config, indent=2) if config else "",
  }


def find_missing(root: Path) -> list[str]:
  """Returns what the page lacks of the stages that the config lists."""
  config = read_json_or_empty(root / "config.json")
  lacks = [] if config else ["config.json: no such file"]
  for name in config.get("stages", []):
    if not (root / name).is_dir():
      lacks.append(f"{name}: has not run")
    elif not (root / name / "done.json").exists():
      lacks.append(f"{name}: has not finished (no {name}/done.json)")
    elif read_stage_facts(root, name).has_rollouts and not list_sample_files(
      root / name
    ):
      lacks.append(f"{name}/samples: has no sampled answers")
  return lacks


def count_outcomes(run: Workdir) -> dict[str, int]:
  """Returns how many answers were mended, broken, right or wrong both times."""
  marks = Counter(
    tuple((row.get(name) or {}).get("correct") for name in run.pair)
    for row in read_rows(run.root / run.evaluation / "answers.jsonl")
  )
  counts = {said: marks[pair] for pair, said in ANSWER_OUTCOMES.items()}
  return counts if any(counts.values()) else {}
