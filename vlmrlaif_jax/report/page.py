"""Writes the report of a run as one self-contained HTML page.

`launch/report.py WORKDIR` writes WORKDIR/report.html. The page of an unfinished run
lists what is missing.
"""

import json
import os
from collections import Counter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from vlmrlaif_jax.core.files import replace_text
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import (
  format_duration,
  format_number,
  list_sample_files,
)
from vlmrlaif_jax.report.files import (
  Workdir,
  clip_text,
  list_report_stages,
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

ANSWER_OUTCOMES = {  # Keys: whether the first and the second policy's answer is right.
  (False, True): "corrected",
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
  """Writes the report of a run and returns its path.

  Args:
    workdir: The run's folder.
    stage: Name of the only stage to show, "" for all.
    out: Path of the page. None is report.html in the workdir or in the stage's folder.

  Raises:
    FileNotFoundError: The workdir or the stage does not exist.
  """
  root = Path(workdir)
  if not root.is_dir():
    raise FileNotFoundError(f"no such folder: {root}; give the workdir of a run")
  stages = list_report_stages(root)
  if stage and stage not in stages:
    raise FileNotFoundError(
      f"{root} has no stage {stage!r}: it has {', '.join(stages)}"
    )
  data = collect_report(open_report_workdir(root, stage))
  if stage:
    title = read_stage_facts(root, stage).title
    data |= {"name": f"{data['name']}: {title}", "one": True}
  return write_page("page.html.j2", data, Path(out or root / stage / "report.html"))


def write_page(template: str, data: JsonRow, path: Path) -> Path:
  """Renders a template, replaces the page atomically and returns its path."""
  environment = Environment(
    loader=FileSystemLoader(TEMPLATE_FOLDER),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "clip": clip_text,
    "count": "{:,}".format,
    "number": lambda x: format_number(float(x)),
    "percent": lambda share: f"{100 * share:.1f} %",
  }
  environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
  page = environment.get_template(template).render(data)
  path.parent.mkdir(parents=True, exist_ok=True)
  replace_text(path, page)
  return path


def collect_report(workdir: Workdir) -> JsonRow:
  """Returns the data of the template."""
  root, stages, (before, after) = workdir.root, workdir.stages, workdir.pair
  sections = [collect_stage(root, name) for name in stages]
  seconds = [stage["seconds"] for stage in sections if stage["seconds"] is not None]
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
    "stages": sections,
    "sampled": [source["name"] for source in samples["sources"]],
    "total": format_duration(sum(seconds)) if seconds else "",
    "longest": max(seconds, default=1) or 1,
    "samples": samples
    | {"alarms": {s["name"]: s["alarm_steps"] for s in sections if s["alarms"]}},
    "checkpoints": read_json_or_empty(root / "checkpoints.json"),
    "config": json.dumps(config, indent=2) if config else "",
  }


def find_missing(root: Path) -> list[str]:
  """Returns a line for each missing file of the stages in the config."""
  config = read_json_or_empty(root / "config.json")
  missing = [] if config else ["config.json: no such file"]
  for name in config.get("stages", []):
    if not (root / name).is_dir():
      missing.append(f"{name}: has not run")
    elif not (root / name / "done.json").exists():
      missing.append(f"{name}: has not finished (no {name}/done.json)")
    elif read_stage_facts(root, name).has_rollouts and not list_sample_files(
      root / name
    ):
      missing.append(f"{name}/samples: has no sampled answers")
  return missing


def count_outcomes(run: Workdir) -> dict[str, int]:
  """Returns the number of held-out answers with each of ANSWER_OUTCOMES."""
  pairs = Counter(
    tuple((row.get(name) or {}).get("correct") for name in run.pair)
    for row in read_rows(run.root / run.evaluation / "answers.jsonl")
  )
  counts = {text: pairs[pair] for pair, text in ANSWER_OUTCOMES.items()}
  return counts if any(counts.values()) else {}
