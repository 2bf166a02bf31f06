"""The report of a run: one self-contained HTML page, made from what the stages wrote.

python -m vlmrlaif_jax.report WORKDIR writes WORKDIR/report.html. A run that is
still going, or was cut short, gets a page that says what is missing.
"""

import argparse
import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from vlmrlaif_jax.log import duration, number
from vlmrlaif_jax.report_charts import chart, even, is_number
from vlmrlaif_jax.report_results import compared, comparison, verdict
from vlmrlaif_jax.report_stages import STAGES, phases_of, stages_there, title
from vlmrlaif_jax.rounds import split_round

Row: TypeAlias = dict[str, Any]

RL = ("ppo", "grpo")  # Those that sample answers.
FILES = {  # What the page is made of, beside metrics.jsonl and done.json.
  "config.json": "the config",
  "label/rates.json": "how often the judge decided",
  "label/preferences.jsonl": "the preference pairs",
  **{f"{name}/samples": f"the answers sampled during {name.upper()}" for name in RL},
  "eval/results.json": "the measured accuracy",
  "eval/answers.jsonl": "the answers of the evaluation",
}
# Metrics whose name holds one of these are shown first, in this order.
LEAD = "reward score kl loss entropy length accuracy truth judge".split()
LEAD_CHARTS = 9
SAMPLE_STEPS, SAMPLE_ROWS = 20, 6
LARGE, SMALL = (8, 96), (4, 64)  # Strips: how many frames, how many pixels high.


def write_report(workdir: str | os.PathLike[str]) -> Path:
  """Writes WORKDIR/report.html and returns its path."""
  root = Path(workdir)
  if not root.is_dir():
    raise FileNotFoundError(f"no such folder: {root}; give the workdir of a run")
  folder = Path(__file__).parent
  pages = Environment(
    loader=FileSystemLoader(folder),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  pages.filters |= {"clip": clip, "number": lambda x: number(float(x))}
  page = pages.get_template("report.html.j2").render(view(root))
  part = root / "report.html.part"
  part.write_text(page, encoding="utf-8")
  return part.replace(root / "report.html")


def view(root: Path) -> Row:
  """All that the template shows."""
  results = read_json(root / "eval/results.json")
  answers = read_lines(root / "eval/answers.jsonl")
  before, after = compared(results["policies"]) if results else ("sft", "ppo")
  strips = Strips(root)
  stages = [stage_view(root, name) for name in stages_there(root)]
  seconds = [stage["seconds"] for stage in stages if stage["seconds"] is not None]
  config = read_json(root / "config.json")
  return {
    "name": root.resolve().name,
    "before": before,
    "after": after,
    "verdict": verdict(results, before, after),
    "missing": missing(root),
    "comparison": comparison(results, before, after) if results else [],
    "outcomes": outcomes(answers, before, after),
    "labels": labels_view(root),
    "stages": stages,
    "total": duration(sum(seconds)) if seconds else "",
    "longest": max(seconds, default=1) or 1,
    "examples": [
      row | {"strip": strips(row.get("video"), *LARGE)}
      for row in pick_examples(answers, before, after)
    ],
    "samples": samples_view(root, strips),
    "checkpoints": read_json(root / "checkpoints.json"),
    "config": json.dumps(config, indent=2) if config else "",
  }


# Reading.


def read_json(path: Path) -> Row:
  """The object in a JSON file; empty where there is none."""
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}): run its stage again") from error


def read_lines(path: Path) -> list[Row]:
  """The rows of a JSONL file, less a last line that is still being written."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")[:-1]
  return [json.loads(line) for line in lines if line]


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


# Answers and labels.


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


def pick_examples(answers: Sequence[Row], before: str, after: str) -> list[Row]:
  """A dozen answers: four mended, four broken, two and two unchanged; or the first."""
  wanted = {"mended": 4, "broken": 4, "right both times": 2, "wrong both times": 2}
  rows = [row | {"outcome": outcome(row, before, after)} for row in answers]
  picked = []
  for name, count in wanted.items():
    picked += spread([row for row in rows if row["outcome"] == name], "kind", count)
  rest = [row for row in rows if row not in picked]
  return picked + spread(rest, "kind", 12 - len(picked))


def spread(rows: Iterable[Row], key: str, count: int) -> list[Row]:
  """`count` rows, taken in turn from each value of `key`."""
  turns: dict[Any, int] = {}
  order = []
  for index, row in enumerate(rows):
    turn = turns[row.get(key)] = turns.get(row.get(key), -1) + 1
    order.append((turn, index, row))
  return [row for _, _, row in sorted(order, key=lambda item: item[:2])[:count]]


def labels_view(root: Path) -> Row:
  """What became of the pairs put before the judge, and some of them; or of claims."""
  rounds = [name for name in stages_there(root) if split_round(name)[0] == "claims"]
  if rounds and not (root / "label").is_dir():
    return claims_view(root, rounds[-1])
  rates = read_json(root / "label/rates.json")
  pairs = read_lines(root / "label/preferences.jsonl")
  asked = rates.get("asked") or 0
  names = {
    "kept": "kept",
    "tie": "tie",
    "order_inconsistent": "changed with the order",
    "unparsable": "not understood",
  }
  parts = [
    {"name": said, "count": rates[key], "share": rates[key] / asked}
    for key, said in names.items()
    if asked and key in rates
  ]
  known = {"asked", "truth_agreement", *names}
  return {
    "asked": asked,
    "told": f"The judge was shown {asked:,} pairs of answers.",
    "parts": parts,
    "agreement": rates.get("truth_agreement"),
    "others": {key.replace("_", " "): rates[key] for key in rates if key not in known},
    "count": len(pairs),
    "pairs": spread(pairs, "agrees_with_truth", 6),
  }


def claims_view(root: Path, stage: str) -> Row:
  """What became of a round's answers and their claims, and some of the pairs."""
  rates = read_json(root / stage / "rates.json")
  pairs = read_lines(root / stage / "preferences.jsonl")
  answers = {key: rates[key] for key in rates if key.startswith("answers_")}
  asked = sum(answers.values())
  known = {"truth_agreement", *answers}
  return {
    "asked": asked,
    "told": f"{title(stage)}: {asked:,} answers, {rates.get('claims', 0):,} claims.",
    "parts": [
      {
        "name": key.removeprefix("answers_").replace("_", " "),
        "count": count,
        "share": count / max(asked, 1),
      }
      for key, count in answers.items()
    ],
    "agreement": rates.get("truth_agreement"),
    "others": {key.replace("_", " "): rates[key] for key in rates if key not in known},
    "count": len(pairs),
    "pairs": spread(pairs, "agrees_with_truth", 6),
  }


def samples_view(root: Path, strips: "Strips") -> list[Row]:
  """The sampled answers of some steps of PPO, and their means over the whole file."""
  found = sample_files(root)
  kept = found if len(found) <= SAMPLE_STEPS else even(found, SAMPLE_STEPS)
  first: dict[str, Row] = {}
  views = []
  for step, path in kept:
    rows = read_lines(path)
    shown = [
      row
      | {"strip": strips(row.get("video"), *SMALL), "earlier": first.get(row.get("id"))}
      for row in rows[:SAMPLE_ROWS]
    ]
    for row in rows:
      first.setdefault(row.get("id"), row | {"step": step})
    means = {key: mean(rows, key) for key in ("score", "truth", "has_stop", "valid")}
    views.append({"step": step, "rows": shown, "means": means, "count": len(rows)})
  return views


def sample_files(root: Path) -> list[tuple[int, Path]]:
  paths = (path for name in RL for path in (root / name / "samples").glob("step_*"))
  return sorted((int(path.stem.removeprefix("step_")), path) for path in paths)


def mean(rows: Sequence[Row], key: str) -> float | None:
  """Over the rows that have a number there, True being 1."""
  found = (row.get(key) for row in rows)
  values = [float(x) for x in found if isinstance(x, bool) or is_number(x)]
  return sum(values) / len(values) if values else None


# Curves.


def stage_view(root: Path, name: str) -> Row:
  """One stage: its time, its summary, its curves."""
  done = read_json(root / name / "done.json")
  rows = read_lines(root / name / "metrics.jsonl")
  columns = {
    key: [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    for key in dict.fromkeys(key for row in rows for key in row)
    if key not in ("step", "time")
  }
  columns = {key: points for key, points in columns.items() if len(points) > 1}
  charts = truth_chart(root, columns) if name in RL else []
  leads = sorted((key for key in columns if rank(key) < len(LEAD)), key=rank)
  leads = leads[: LEAD_CHARTS - len(charts)]
  return {
    "name": name,
    "title": title(name),
    "seconds": done.get("seconds"),
    "duration": duration(done["seconds"]) if done else "not finished",
    "summary": done.get("summary") or {},
    "charts": charts + [chart(key, {key: columns[key]}) for key in leads],
    "others": [chart(key, {key: columns[key]}) for key in columns if key not in leads],
    "steps": rows[-1]["step"] if rows else 0,
    "phases": phases_of(rows),
  }


def rank(key: str) -> int:
  """Where a metric stands in LEAD; its length where it does not."""
  hits = [index for index, word in enumerate(LEAD) if word in key]
  return hits[0] if hits else len(LEAD)


def truth_chart(root: Path, columns: dict[str, list[Any]]) -> list[Row]:
  """The judge's score and exact truth in one chart: a hacked reward parts them."""
  truth = [points for key, points in columns.items() if "truth" in key]
  judge = [
    points
    for word in ("judge", "score", "reward")
    for key, points in columns.items()
    if word in key
  ]
  if not (truth and judge):
    files = [(step, read_lines(path)) for step, path in sample_files(root)]
    truth, judge = (
      [[(step, x) for step, rows in files if (x := mean(rows, key)) is not None]]
      for key in ("truth", "score")
    )
  if len(truth[0]) < 2 or len(judge[0]) < 2:
    return []
  return [chart("judge and truth", {"judge": judge[0], "truth": truth[0]})]


def clip(text: object, length: int = 800) -> str:
  """The text, cut where it is longer than a page can bear."""
  text = str(text)
  return text if len(text) <= length else text[:length].rstrip() + " …"


# Videos.


class Strips:
  """Frames of videos as data URIs; a video that is shown often is decoded once."""

  def __init__(self, root: Path):
    self.root = root
    self.made: dict[tuple[str, int], Row] = {}

  def __call__(self, video: str | None, count: int, height: int) -> Row:
    """The frames, or why there are none."""
    if not video:
      return {"frames": [], "error": "the row names no video"}
    if (video, count) not in self.made:
      self.made[video, count] = self._make(video, count, height)
    return self.made[video, count]

  def _make(self, video: str, count: int, height: int) -> Row:
    path = self.root / "world/videos" / video  # An absolute path stays as it is.
    if not path.exists():
      return {"frames": [], "error": f"no such file: {video}"}
    # Imported only where there is a video: a report of numbers needs no decoder.
    from vlmrlaif_jax.data.video import VideoError, decode

    try:
      frames = decode(path, count)
    except VideoError as error:
      return {"frames": [], "error": str(error)}
    return {"frames": [frame_uri(frame, height) for frame in frames], "error": ""}


def frame_uri(frame: UInt8[np.ndarray, "height width 3"], height: int) -> str:
  """A frame as a JPEG at most `height` high; the browser enlarges small ones."""
  image = Image.fromarray(frame)
  if image.height > height:
    image = image.resize((round(image.width * height / image.height), height))
  data = io.BytesIO()
  # Colours at full resolution: frames may be 32 pixels wide.
  image.save(data, "JPEG", quality=80, subsampling=0)
  return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("workdir", type=Path)
  print(write_report(parser.parse_args().workdir))


if __name__ == "__main__":
  main()
