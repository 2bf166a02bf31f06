"""Writes the results of a study as tables and figures into docs/results.md."""

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

MEASURES = {  # Column: the name in eval/results.json, and the factor to the unit.
  "correct answers": ("accuracy", 100),
  "false premise": ("false_premise.accuracy", 100),
  "unsupported statements": ("hallucination", 100),
  "true statements made": ("recall", 100),
  "words": ("words", 1),
}
DRAWN = ("correct answers", "unsupported statements", "true statements made")
SUMMARIES = {  # Column: a stage and a number in its summary, in per cent.
  "labels right": ("label", "truth_agreement"),
  "reward model right": ("rm", "held_out_accuracy"),
}


class Spread(NamedTuple):
  """A mean over seeds with its 95 % interval."""

  mean: float
  half: float | None  # Half of the interval's width; None for a single seed.
  each: tuple[float, ...]  # Value of each seed.


def compute_spread(values: Sequence[float]) -> Spread:
  """Computes the mean and Student's t interval over seeds."""
  mean, count = statistics.mean(values), len(values)
  if count < 2:
    return Spread(mean, None, tuple(values))
  error = statistics.stdev(values) / count**0.5
  return Spread(mean, float(stats.t.ppf(0.975, count - 1)) * error, tuple(values))


def format_spread(spread: Spread, sign: str = "") -> str:
  """Formats a mean and its interval; a sign of "+" is shown for positive means."""
  half = "" if spread.half is None else f" ± {spread.half:.1f}"
  return f"{spread.mean:{sign}.1f}{half}"


def read_row(row: Row, root: pathlib.Path, seeds: Sequence[int]) -> dict[str, list]:
  """Returns each column's values by seed, with None for missing ones."""
  folders = [root / f"{row.arm}-{seed}" for seed in seeds]
  columns = {
    name: [scale(study.read_mean(f, row.policy, measure), by) for f in folders]
    for name, (measure, by) in MEASURES.items()
  }
  for name, (stage, number) in SUMMARIES.items():
    trained = row.policy != "sft"  # SFT uses neither labels nor a reward model.
    values = [
      study.read_summary(f, stage, number) if trained else None for f in folders
    ]
    columns[name] = [scale(each, 100) for each in values]
  return columns


def select_measured_rows(
  table: Table, root: pathlib.Path, seeds: Sequence[int]
) -> Iterable[Row]:
  """Yields the rows that were measured on all seeds."""
  for row in table.rows:
    if None not in read_row(row, root, seeds)["correct answers"]:
      yield row


def scale(number: float | None, by: int) -> float | None:
  """Returns a number times a factor; None stays None."""
  return None if number is None else by * number


def make_table(table: Table, root: pathlib.Path, seeds: Sequence[int]) -> str:
  """Returns a table of means, and of the gain in correct answers over the first row."""
  columns = {row: read_row(row, root, seeds) for row in table.rows}
  base = columns[table.rows[0]]["correct answers"]
  names = (*MEASURES, *SUMMARIES)
  used = [
    n for n in names if any(v is not None for m in columns.values() for v in m[n])
  ]
  lines = []
  for row, values in columns.items():
    cells = [format_cell(values[name]) for name in used]
    now = values["correct answers"]
    gains = [a - b for a, b in zip(now, base, strict=True) if None not in (a, b)]
    gain = (
      format_spread(compute_spread(gains), "+")
      if gains and row != table.rows[0]
      else ""
    )
    lines.append([row.title, *cells, gain, row.paper])
  head = ["", *used, "gain in correct answers", f"paper: {table.paper}"]
  return markdown_table(lines, head)


def make_scores_table(table: Scores, root: pathlib.Path, seeds: Sequence[int]) -> str:
  """Returns a table of each measure before and after, and of the paired difference."""
  folders, lines = [root / f"{table.arm}-{seed}" for seed in seeds], []
  for row in table.rows:
    before, after = (
      [
        scale(study.read_mean(f, policy, row.measure, row.benchmark), row.scale)
        for f in folders
      ]
      for policy in table.policies
    )
    changes = [b - a for a, b in zip(before, after, strict=True) if None not in (a, b)]
    gain = format_spread(compute_spread(changes), "+") if changes else ""
    lines.append(
      [row.title, format_cell(before), format_cell(after), gain, " -> ".join(row.paper)]
    )
  names = [policy.upper() for policy in table.policies]
  return markdown_table(lines, ["", *names, "difference", "paper"])


def format_cell(values: Sequence[float | None]) -> str:
  """Formats the mean of the measured seeds, and each value."""
  return format_seeds([value for value in values if value is not None])


def draw_figure(
  table: Table, root: pathlib.Path, seeds: Sequence[int], path: pathlib.Path
) -> None:
  """Draws a panel per measure: the mean, interval and seeds of each row of a table."""
  figure = create_figure(9, 0.8 + 0.36 * len(table.rows))
  panels = figure.subplots(1, len(DRAWN), sharey=True)
  for name, axes in zip(DRAWN, panels, strict=True):
    for place, row in enumerate(table.rows):
      values = [v for v in read_row(row, root, seeds)[name] if v is not None]
      if not values:
        continue
      spread = compute_spread(values)
      axes.plot(values, [place] * len(values), "o", color="#9aa7b5", markersize=4)
      axes.errorbar(
        spread.mean,
        place,
        xerr=spread.half or 0,
        fmt="D",
        color="#1f6fb2",
        markersize=5,
      )
    axes.set_title(f"{name}, %", fontsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right", "left"):
      axes.spines[side].set_visible(False)
  panels[0].set_yticks(range(len(table.rows)), [row.title for row in table.rows])
  panels[0].invert_yaxis()
  save_figure(figure, path)


def format_command(names: Iterable[str]) -> str:
  """Returns a code block with the command that runs arms."""
  arms = ",".join(dict.fromkeys(names))
  return f"```bash\npython tools/run_study.py --workdir=runs/study --only={arms}\n```"


def write(
  path: pathlib.Path,
  tables: Sequence[Table],
  scores: Sequence[Scores],
  root: pathlib.Path,
  seeds: Sequence[int],
) -> None:
  """Writes each table between its markers in a file, and its figure to figures/.

  Tables whose measured rows are from fewer than two arms are skipped.

  Args:
    path: The file.
    tables: Tables of held-out questions, with a figure each.
    scores: Tables of benchmarks.
    root: Folder with the workdirs.
    seeds: Seeds of the runs.
  """
  text = path.read_text()
  for whole in tables:
    table = whole._replace(rows=tuple(select_measured_rows(whole, root, seeds)))
    if len({row.arm for row in table.rows}) < 2:
      continue
    figure = f"study_{table.name}.png"
    draw_figure(table, root, seeds, path.parent / "figures" / figure)
    picture = f"![{table.title}](figures/{figure})"
    line = format_command(row.arm for row in whole.rows)
    block = "\n\n".join([line, make_table(table, root, seeds), picture])
    text = replace_block(text, f"study-{table.name}", block)
  for each in scores:
    paths = [root / f"{each.arm}-{seed}" / "eval/results.json" for seed in seeds]
    if any(path.exists() for path in paths):
      block = "\n\n".join(
        [format_command([each.arm]), make_scores_table(each, root, seeds)]
      )
      text = replace_block(text, f"study-{each.name}", block)
  path.write_text(text)
