"""What perf/bench.py measured, as tables and figures in docs/benchmarks.md."""

import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from perf.pages import new_figure, replace_block, save_figure
from vlmrlaif_jax.core.markdown import markdown_table

Row: TypeAlias = dict[str, Any]  # See bench.measure.
Numbers: TypeAlias = Sequence[float | int]

ORDER = ("machine", "sft", "dpo", "grpo", "ppo", "sample", "load", "curve")
PEERS = {"trl": "TRL", "tunix": "Tunix", "": "-"}
AXES = {
  "frames": "frames",
  "group": "answers to each prompt",
  "new": "tokens of each answer",
  "prompts": "prompts",
}


def ordered(rows: Iterable[Row]) -> list[Row]:
  """By size and by what was measured, in the order of ORDER."""
  return sorted(rows, key=lambda r: (r["size"], ORDER.index(r["what"]), r["peer"]))


def ratios(row: Row) -> tuple[float, float, float]:
  """The peer's seconds over ours, pair by pair: median, lowest and highest."""
  each = [b / a for a, b in zip(row["ours"], row["theirs"], strict=True)]
  return statistics.median(each), min(each), max(each)


def pairs_table(rows: Sequence[Row]) -> str:
  """Ours beside each peer."""
  lines = []
  for row in ordered(r for r in rows if r.get("theirs")):
    ours, theirs = (statistics.median(row[key]) for key in ("ours", "theirs"))
    middle, low, high = ratios(row)
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


def machine_table(rows: Sequence[Row]) -> str:
  """The machine's peaks, and what of them each of our steps reaches."""
  peaks = [row for row in rows if row["what"] == "machine"]
  if not peaks:
    return ""
  peak = peaks[-1]
  lines = []
  seen = set()
  for row in ordered(r for r in rows if r.get("ours")):
    key = (row["size"], row["what"], row["frames"])
    if key not in seen:  # Those beside another peer are much the same.
      seen.add(key)
      lines += _shares(row, peak)
  told = (
    f"Measured peaks: {peak['flops_float32'] / 1e9:,.0f} GFLOP/s in float32, "
    f"{peak['flops_bfloat16'] / 1e9:,.0f} in bfloat16; memory "
    f"{peak['bytes_per_s'] / 1e9:,.1f} GB/s.\n\n"
  )
  head = (
    "size, step, frames, seconds, tokens/s, GFLOP, GFLOP/s, MFU, GB/s, of bandwidth"
  )
  return told + markdown_table(lines, head.split(", "))


def _shares(row: Row, peak: Row) -> list[list[str]]:
  """Lines for the whole of a step, its parts, and its decoding."""
  whole = dict(seconds=statistics.median(row["ours"]), flops=row["flops"])
  lines = []

  def line(step: str, seconds: float, *cells: str) -> None:
    lines.append([row["size"], step, str(row["frames"]), f"{seconds:.3g}", *cells])

  for name, part in ({"": whole} | row["parts"]).items():
    if part["flops"]:
      rate = part["flops"] / part["seconds"]
      share = f"{rate / peak['flops_' + row['dtype']]:.0%}"
      counts = f"{part['flops'] / 1e9:,.0f}", f"{rate / 1e9:,.0f}", share
      tokens = "-" if name else f"{_all_tokens(row) / whole['seconds']:,.0f}"
      step = f"{row['what']}: {name}" if name else row["what"]
      line(step, part["seconds"], tokens, *counts, "-", "-")
  if row["step_bytes"]:
    seconds = whole["seconds"] - row["parts"]["prefill"]["seconds"]
    rate = row["step_bytes"] * (row["new"] - 1) / seconds
    share = f"{rate / peak['bytes_per_s']:.0%}"
    line("sample: decode", seconds, "-", "-", "-", "-", f"{rate / 1e9:.1f}", share)
  return lines


def _all_tokens(row: Row) -> float:
  """Of a step: those of each answer and of the prompt before it."""
  if row["what"] in ("sft", "dpo"):
    return row["tokens"]
  return row["tokens"] * (row["prompt"] + row["new"]) / row["new"]


def slope(xs: Numbers, ys: Numbers) -> float:
  """Of the straight line that fits log y over log x best: 1 is proportional."""
  xs, ys = [[math.log(v) for v in values] for values in (xs, ys)]
  x, y = statistics.mean(xs), statistics.mean(ys)
  over = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
  return over / sum((a - x) ** 2 for a in xs)


def curves_table(rows: Sequence[Row]) -> str:
  lines = []
  for row in ordered(r for r in rows if r["what"] == "curve"):
    points = zip(row["points"], row["seconds"], strict=True)
    lines.append(
      [
        row["size"],
        AXES[row["peer"]],
        ", ".join(f"{x}: {y:.3g}" for x, y in points),
        f"{slope(row['points'], row['seconds']):.2f}",
      ]
    )
  return markdown_table(lines, ["size", "over", "seconds of a step", "log-log slope"])


def provenance(rows: Sequence[Row], command: str) -> str:
  """When, on what, with what, and how to do it again."""
  last = rows[-1]
  peers = sorted({r["peer_software"] for r in rows if "peer_software" in r})
  where = f"{last['date']}, {last['machine']}, {last['device']}; "
  return f"```bash\n{command}\n```\n\n{where}{'; '.join([last['software'], *peers])}."


def write(path: pathlib.Path, rows: Sequence[Row], command: str) -> None:
  """Puts tables between the markers of the file, and figures beside it.

  A block of which nothing was measured stays as it is.
  """
  text = path.read_text()
  of_cpu = [row for row in rows if row["device"] == "cpu"]
  drawn = draw(of_cpu, path.parent / "figures")
  of_gpu = [row for row in rows if row["device"] != "cpu"]
  for name, part in (("cpu", of_cpu), ("gpu", of_gpu)):
    if not part:
      continue
    blocks = {
      "pairs": pairs_table(part),
      "machine": machine_table(part),
      "curves": curves_table(part),
      "made": provenance(part, command),
    }
    if name == "cpu":
      for block, figure in drawn.items():
        blocks[block] += f"\n\n![The same, drawn](figures/{figure})"
    for block, made in blocks.items():
      text = replace_block(text, f"{name}-{block}", made)
  path.write_text(text)


def draw(rows: Sequence[Row], folder: pathlib.Path) -> dict[str, str]:
  """Draws bench_ratios.png and bench_curves.png, of as much as was measured.

  Returns:
    The names of the files that were drawn, by the block that they belong to.
  """
  beside = ordered(row for row in rows if row.get("theirs"))
  curves = ordered(row for row in rows if row["what"] == "curve")
  drawn = {}
  for block, name, chosen, figure in (
    ("pairs", "bench_ratios.png", beside, _draw_ratios),
    ("curves", "bench_curves.png", curves, _draw_curves),
  ):
    if chosen:
      save_figure(figure(chosen), folder / name)
      drawn[block] = name
  return drawn


def _draw_ratios(rows):
  figure = new_figure(7, 0.4 * len(rows) + 1)
  axes = figure.subplots()
  names = [f"{r['size']} {r['what']}, {PEERS[r['peer']]}" for r in rows]
  middles, lows, highs = zip(*map(ratios, rows), strict=True)
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
  figure = new_figure(9, 2.6)
  every = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
  for axes, row in zip(every, rows, strict=True):
    axes.loglog(row["points"], row["seconds"], "o-", color="#4477aa")
    axes.set_xticks(row["points"], map(str, row["points"]))
    axes.minorticks_off()
    axes.set_xlabel(AXES[row["peer"]])
    axes.set_title(f"slope {slope(row['points'], row['seconds']):.2f}", fontsize=9)
    axes.grid(alpha=0.3)
  every[0].set_ylabel("seconds of a step of GRPO")
  return figure
