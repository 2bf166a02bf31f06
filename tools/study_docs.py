"""What a study measured, as tables and figures in docs/results.md."""

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy import stats

from perf.pages import create_figure, replace_block, save_figure
from tools import study
from tools.study import Row, Scores, Table
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.evals.summary import format_seeds

MEASURES = {  # Column: where it stands in eval/results.json, and in what unit.
  "correct answers": ("accuracy", 100),
  "false premise": ("false_premise.accuracy", 100),
  "unsupported statements": ("hallucination", 100),
  "true statements made": ("recall", 100),
  "words": ("words", 1),
}
DRAWN = ("correct answers", "unsupported statements", "true statements made")
SUMMARIES = {  # Column: a stage and a number of its summary, in per cent.
  "labels right": ("label", "truth_agreement"),
  "reward model right": ("rm", "held_out_accuracy"),
}


class Spread(NamedTuple):
  """Of some seeds: the mean, half of its 95 % interval, and each."""

  mean: float
  half: float | None  # None of a single seed.
  each: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
  """Student's t interval over seeds: wide for three, as it should be."""
  mean, count = statistics.mean(values), len(values)
  if count < 2:
    return Spread(mean, None, tuple(values))
  error = statistics.stdev(values) / count**0.5
  return Spread(mean, float(stats.t.ppf(0.975, count - 1)) * error, tuple(values))


def said(found: Spread, sign: str = "") -> str:
  half = "" if found.half is None else f" ± {found.half:.1f}"
  return f"{found.mean:{sign}.1f}{half}"


def of_row(row: Row, root: pathlib.Path, seeds: Sequence[int]) -> dict[str, list]:
  """Each column's values, seed by seed; None where there is none."""
  folders = [root / f"{row.arm}-{seed}" for seed in seeds]
  found = {
    name: [scaled(study.value(f, row.policy, place), by) for f in folders]
    for name, (place, by) in MEASURES.items()
  }
  for name, (stage, number) in SUMMARIES.items():
    trained = row.policy != "sft"  # SFT knows neither labels nor a reward model.
    values = [study.of_stage(f, stage, number) if trained else None for f in folders]
    found[name] = [scaled(each, 100) for each in values]
  return found


def measured(table: Table, root: pathlib.Path, seeds: Sequence[int]) -> Iterable[Row]:
  """The rows that all seeds have."""
  for row in table.rows:
    if None not in of_row(row, root, seeds)["correct answers"]:
      yield row


def scaled(number: float | None, by: int) -> float | None:
  return None if number is None else by * number


def markdown(table: Table, root: pathlib.Path, seeds: Sequence[int]) -> str:
  """Means, and the gain in correct answers over the first row with its interval."""
  made = {row: of_row(row, root, seeds) for row in table.rows}
  base = made[table.rows[0]]["correct answers"]
  names = (*MEASURES, *SUMMARIES)
  used = [n for n in names if any(v is not None for m in made.values() for v in m[n])]
  lines = []
  for row, found in made.items():
    cells = [cell(found[name]) for name in used]
    now = found["correct answers"]
    gains = [a - b for a, b in zip(now, base, strict=True) if None not in (a, b)]
    gain = said(spread(gains), "+") if gains and row != table.rows[0] else ""
    lines.append([row.title, *cells, gain, row.paper])
  head = ["", *used, "gain in correct answers", f"paper: {table.paper}"]
  return markdown_table(lines, head)


def of_scores(table: Scores, root: pathlib.Path, seeds: Sequence[int]) -> str:
  """Each measure before and after, and the difference, seed by seed."""
  folders, lines = [root / f"{table.arm}-{seed}" for seed in seeds], []
  for row in table.rows:
    before, after = (
      [
        scaled(study.value(f, policy, row.measure, row.benchmark), row.scale)
        for f in folders
      ]
      for policy in table.policies
    )
    apart = [b - a for a, b in zip(before, after, strict=True) if None not in (a, b)]
    gain = said(spread(apart), "+") if apart else ""
    lines.append([row.title, cell(before), cell(after), gain, " -> ".join(row.paper)])
  names = [policy.upper() for policy in table.policies]
  return markdown_table(lines, ["", *names, "difference", "paper"])


def cell(values: Sequence[float | None]) -> str:
  """Formats the mean of the seeds that were measured, and each."""
  return format_seeds([value for value in values if value is not None])


def draw(
  table: Table, root: pathlib.Path, seeds: Sequence[int], path: pathlib.Path
) -> None:
  """A row of panels, one a measure: the mean of each row, its interval, its seeds."""
  figure = create_figure(9, 0.8 + 0.36 * len(table.rows))
  panels = figure.subplots(1, len(DRAWN), sharey=True)
  for name, axes in zip(DRAWN, panels, strict=True):
    for place, row in enumerate(table.rows):
      values = [v for v in of_row(row, root, seeds)[name] if v is not None]
      if not values:
        continue
      found = spread(values)
      axes.plot(values, [place] * len(values), "o", color="#9aa7b5", markersize=4)
      axes.errorbar(
        found.mean, place, xerr=found.half or 0, fmt="D", color="#1f6fb2", markersize=5
      )
    axes.set_title(f"{name}, %", fontsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right", "left"):
      axes.spines[side].set_visible(False)
  panels[0].set_yticks(range(len(table.rows)), [row.title for row in table.rows])
  panels[0].invert_yaxis()
  save_figure(figure, path)


def commands(names: Iterable[str]) -> str:
  arms = ",".join(dict.fromkeys(names))
  return f"```bash\npython tools/run_study.py --workdir=runs/study --only={arms}\n```"


def write(
  path: pathlib.Path,
  tables: Sequence[Table],
  scores: Sequence[Scores],
  root: pathlib.Path,
  seeds: Sequence[int],
) -> None:
  """Writes each table between its markers of the file, and its figure to figures/.

  A table needs at least two rows that were measured on all seeds.
  """
  text = path.read_text()
  for whole in tables:
    table = whole._replace(rows=tuple(measured(whole, root, seeds)))
    if len({row.arm for row in table.rows}) < 2:
      continue
    figure = f"study_{table.name}.png"
    draw(table, root, seeds, path.parent / "figures" / figure)
    picture = f"![{table.title}](figures/{figure})"
    line = commands(row.arm for row in whole.rows)
    block = "\n\n".join([line, markdown(table, root, seeds), picture])
    text = replace_block(text, f"study-{table.name}", block)
  for each in scores:
    made = [root / f"{each.arm}-{seed}" / "eval/results.json" for seed in seeds]
    if any(path.exists() for path in made):
      block = "\n\n".join([commands([each.arm]), of_scores(each, root, seeds)])
      text = replace_block(text, f"study-{each.name}", block)
  path.write_text(text)
