"""Writes the rows of perf/bench.py into docs/benchmarks.md, as tables and figures."""

import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from perf.pages import create_figure, replace_block, save_figure
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.markdown import markdown_table

Numbers: TypeAlias = Sequence[float | int]

ORDER = ("machine", "sft", "dpo", "grpo", "ppo", "sample", "load", "curve")
PEERS = {"trl": "TRL", "tunix": "Tunix", "": "-"}
AXES = {
  "frames": "frames",
  "group": "answers to each prompt",
  "new": "tokens of each answer",
  "prompts": "prompts",
}


def sort_rows(rows: Iterable[JsonRow]) -> list[JsonRow]:
  """Sorts rows by size, by measurement in the order of ORDER, and by peer."""
  return sorted(rows, key=lambda r: (r["size"], ORDER.index(r["what"]), r["peer"]))


def compute_ratios(row: JsonRow) -> tuple[float, float, float]:
  """Returns the median, least and greatest ratio of a peer's seconds to ours."""
  each = [b / a for a, b in zip(row["ours"], row["theirs"], strict=True)]
  return statistics.median(each), min(each), max(each)


def format_pairs(rows: Sequence[JsonRow]) -> str:
  """Formats our times next to each peer's."""
  lines = []
  for row in sort_rows(r for r in rows if r.get("theirs")):
    ours, theirs = (statistics.median(row[key]) for key in ("ours", "theirs"))
    middle, low, high = compute_ratios(row)
    rate = lambda s, row=row: f"{row['tokens'] / s:,.0f}" if row["tokens"] else "-"
    lines.append(
      [
        row["size"],
        row["what"],
        PEERS[row["peer"]],
        f"{row['tokens']:,}",
        f"{ours:.3g}",
        f"{theirs:.3g}",
        f"**{middle:.2f}** ({low:.2f} to {high:.2f})",
        rate(ours),
        rate(theirs),
        f"{row['first']:.0f}, {row['first_theirs']:.0f}",
      ]
    )
  head = "size, what, against, tokens, ours s, theirs s, theirs / ours, ours tokens/s"
  head = [*head.split(", "), "theirs tokens/s", "first run: ours, theirs s"]
  return markdown_table(lines, head)


def format_machine(rows: Sequence[JsonRow]) -> str:
  """Formats the machine's peaks and the share of them that our steps reach."""
  peaks = [row for row in rows if row["what"] == "machine"]
  if not peaks:
    return ""
  peak = peaks[-1]
  lines = []
  seen = set()
  for row in sort_rows(r for r in rows if r.get("ours")):
    key = (row["size"], row["what"], row["frames"])
    if key not in seen:  # Rows with another peer repeat our times.
      seen.add(key)
      lines += _list_shares(row, peak)
  peaks_line = (
    f"Measured peaks: {peak['flops_float32'] / 1e9:,.0f} GFLOP/s in float32, "
    f"{peak['flops_bfloat16'] / 1e9:,.0f} in bfloat16; memory "
    f"{peak['bytes_per_s'] / 1e9:,.1f} GB/s.\n\n"
  )
  head = (
    "size, step, frames, seconds, tokens/s, GFLOP, GFLOP/s, MFU, GB/s, of bandwidth"
  )
  return peaks_line + markdown_table(lines, head.split(", "))


def _list_shares(row: JsonRow, peak: JsonRow) -> list[list[str]]:
  """Returns table lines for a step, its parts, and its decoding."""
  whole = dict(seconds=statistics.median(row["ours"]), flops=row["flops"])
  lines = []

  def line(step: str, seconds: float, *cells: str) -> None:
    lines.append([row["size"], step, str(row["frames"]), f"{seconds:.3g}", *cells])

  for name, part in ({"": whole} | row["parts"]).items():
    if part["flops"]:
      rate = part["flops"] / part["seconds"]
      share = f"{rate / peak['flops_' + row['dtype']]:.0%}"
      counts = f"{part['flops'] / 1e9:,.0f}", f"{rate / 1e9:,.0f}", share
      tokens = "-" if name else f"{_count_tokens(row) / whole['seconds']:,.0f}"
      step = f"{row['what']}: {name}" if name else row["what"]
      line(step, part["seconds"], tokens, *counts, "-", "-")
  if row["step_bytes"]:
    seconds = whole["seconds"] - row["parts"]["prefill"]["seconds"]
    rate = row["step_bytes"] * (row["new"] - 1) / seconds
    share = f"{rate / peak['bytes_per_s']:.0%}"
    line("sample: decode", seconds, "-", "-", "-", "-", f"{rate / 1e9:.1f}", share)
  return lines


def _count_tokens(row: JsonRow) -> float:
  """Returns the tokens of a step; each response counts with its prompt."""
  if row["what"] in ("sft", "dpo"):
    return row["tokens"]
  return row["tokens"] * (row["prompt"] + row["new"]) / row["new"]


def fit_slope(xs: Numbers, ys: Numbers) -> float:
  """Returns the slope of log y over log x, by least squares; 1 is proportional."""
  xs, ys = [[math.log(v) for v in values] for values in (xs, ys)]
  x, y = statistics.mean(xs), statistics.mean(ys)
  over = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
  return over / sum((a - x) ** 2 for a in xs)


def format_curves(rows: Sequence[JsonRow]) -> str:
  """Formats the seconds of a step along each curve, with its slope."""
  lines = []
  for row in sort_rows(r for r in rows if r["what"] == "curve"):
    points = zip(row["points"], row["seconds"], strict=True)
    lines.append(
      [
        row["size"],
        AXES[row["peer"]],
        ", ".join(f"{x}: {y:.3g}" for x, y in points),
        f"{fit_slope(row['points'], row['seconds']):.2f}",
      ]
    )
  return markdown_table(lines, ["size", "over", "seconds of a step", "log-log slope"])


def format_provenance(rows: Sequence[JsonRow], command: str) -> str:
  """Returns the command, the machine and the software that produced the rows."""
  last = rows[-1]
  peers = sorted({r["peer_software"] for r in rows if "peer_software" in r})
  where = f"{last['date']}, {last['machine']}, {last['device']}; "
  return f"```bash\n{command}\n```\n\n{where}{'; '.join([last['software'], *peers])}."


def write_page(path: pathlib.Path, rows: Sequence[JsonRow], command: str) -> None:
  """Writes tables between the markers of a page, and figures next to the page.

  Blocks without rows stay as they are.

  Args:
    path: The page.
    rows: Rows of bench.measure.
    command: The command that measured the rows.
  """
  text = path.read_text()
  cpu_rows = [row for row in rows if row["device"] == "cpu"]
  drawn = draw_figures(cpu_rows, path.parent / "figures")
  gpu_rows = [row for row in rows if row["device"] != "cpu"]
  for name, part in (("cpu", cpu_rows), ("gpu", gpu_rows)):
    if not part:
      continue
    blocks = {
      "pairs": format_pairs(part),
      "machine": format_machine(part),
      "curves": format_curves(part),
      "made": format_provenance(part, command),
    }
    if name == "cpu":
      for block, figure in drawn.items():
        blocks[block] += f"\n\n![The same, drawn](figures/{figure})"
    for block, content in blocks.items():
      text = replace_block(text, f"{name}-{block}", content)
  path.write_text(text)


def draw_figures(rows: Sequence[JsonRow], folder: pathlib.Path) -> dict[str, str]:
  """Draws bench_ratios.png and bench_curves.png, if there are rows for them.

  Returns:
    The names of the figures by the block that they belong to.
  """
  compared = sort_rows(row for row in rows if row.get("theirs"))
  curves = sort_rows(row for row in rows if row["what"] == "curve")
  drawn = {}
  for block, name, chosen, figure in (
    ("pairs", "bench_ratios.png", compared, _draw_ratios),
    ("curves", "bench_curves.png", curves, _draw_curves),
  ):
    if chosen:
      save_figure(figure(chosen), folder / name)
      drawn[block] = name
  return drawn


def _draw_ratios(rows):
  figure = create_figure(7, 0.4 * len(rows) + 1)
  axes = figure.subplots()
  names = [f"{r['size']} {r['what']}, {PEERS[r['peer']]}" for r in rows]
  middles, lows, highs = zip(*map(compute_ratios, rows), strict=True)
  spread = [
    [m - a for m, a in zip(middles, lows, strict=True)],
    [b - m for m, b in zip(middles, highs, strict=True)],
  ]
  axes.barh(names, middles, xerr=spread, color="#4477aa", ecolor="#222222", capsize=3)
  axes.axvline(1, color="#222222", linewidth=1)
  axes.invert_yaxis()
  axes.set_xlabel("times as long as ours: median of the pairs, lowest and highest")
  return figure


def _draw_curves(rows):
  figure = create_figure(9, 2.6)
  every = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
  for axes, row in zip(every, rows, strict=True):
    axes.loglog(row["points"], row["seconds"], "o-", color="#4477aa")
    axes.set_xticks(row["points"], map(str, row["points"]))
    axes.minorticks_off()
    axes.set_xlabel(AXES[row["peer"]])
    axes.set_title(f"slope {fit_slope(row['points'], row['seconds']):.2f}", fontsize=9)
    axes.grid(alpha=0.3)
  every[0].set_ylabel("seconds of a step of GRPO")
  return figure
