"""Writes docs/scaling.md and its figures from the plans of all points."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from perf.pages import create_figure, save_figure
from tools.scaling_points import (
  FIRST,
  FRAMES,
  GROUPS,
  METHODS,
  SLICES,
  Point,
  list_points,
)
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.planner import topologies

GIB = 2**30

PlanRow: TypeAlias = Mapping[str, Any]  # A row of launch/plan.py.
Rows: TypeAlias = Mapping[str, PlanRow]  # The best plan of each point by its name.

HEAD = """# Compare the cost of slices

Step time, memory and cost of the 7B recipes on TPU and GPU slices. Nothing on this page
was run on an accelerator. Memory comes from the accelerators' compilers. Time is
computed from operations, bytes and messages. [planning.md](planning.md) explains both
and compares them with measurements.

Assumptions:

- A prompt has 50 frames of 576 patches and 768 tokens. Every response has 896 tokens.
- LoRA has rank 64, weights are bfloat16, and layers are recomputed (remat). Attention
  is splash on TPUs and cuDNN's on GPUs.
- Programs reach 60 % of a chip's operations per second, 80 % of its memory bandwidth
  and 70 % of its links' bandwidth: `reached` in `configs/prices.py`. None of these
  shares was measured.
- Prices are on-demand list prices of {date} (same file). Cost is for 1,000 steps.
- GRPO_rank samples 5 responses to each of 256 prompts, 320 concurrently
  (`grpo.slots=320`). A cache for all responses would take 1 TiB. The responses of a
  group share one copy of their prompt.
- Rows are prompts, pairs or examples of a step. v5e-16 has a second line with 64 rows,
  where GRPO_rank samples 160 responses concurrently.
- The mesh and the microbatches are the fastest that fit, by the estimate from shapes.
  On GPUs they are the fastest of the three best estimates after compilation. "Fits"
  leaves 12 % of a device's memory free.
- An **estimate** was not compiled. Its peak and collectives come from shapes. Its time
  is too low, because compilers add collectives that the estimate does not contain. An
  estimated "no" close to the memory limit may fit.

```bash
pip install -e ".[plan,plan-gpu,bench]"
# All points: estimates take minutes, compilation takes hours. A killed run resumes.
python tools/scaling.py --out=runs/scaling
# One row:
python launch/plan.py {command}
```
"""


def write(path: pathlib.Path, rows: Rows) -> None:
  """Writes the document, and its figures into the folder figures/ next to it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  draw_figures(rows, path.parent / "figures")
  path.write_text(make_document(rows))


def make_document(rows: Rows) -> str:
  """Returns the text of docs/scaling.md, with the names of missing points."""
  from configs import prices

  known = [point for point in list_points() if point.name in rows]
  first = list_points()[0]
  command = " \\\n  ".join(first.make_command())
  lines = [HEAD.format(date=prices.get_config().date, command=command)]
  lines += ["![Step time and cost against chips](figures/scaling_chips.png)", ""]
  lines += ["Hollow points are estimates. A line joins slices of one kind of chip.", ""]
  for name, method in METHODS.items():
    own = [point for point in known if point.name.startswith(f"{name}_")]
    own.sort(key=lambda point: SLICES.index(point.topology))
    lines += [f"## {method.title}", "", _tabulate_slices(own, rows), ""]
  lines += ["![Step time and cost against frames and the size of a group]"
            "(figures/scaling_curves.png)", ""]  # fmt: skip
  for title, key in (("Frames", "frames"), ("Responses of a group", "group")):
    own = [point for point in known if point.name.startswith(f"{key}_")]
    lines += [f"## {title}", "", _ABOUT[key], "", _tabulate_curve(own, rows, key), ""]
  lines += [*_describe_estimates(rows), ""]
  if missing := [point.name for point in list_points() if point.name not in rows]:
    lines += ["## Missing", "", "Not planned yet: " + ", ".join(missing) + ".", ""]
  return "\n".join(lines).rstrip() + "\n"


_ABOUT = {
  "frames": (
    "128 prompts. A prompt has one token per frame and 576 tokens for patches. A frame "
    "therefore costs little more than its encoding and projection."
  ),
  "group": "GRPO_rank, 64 prompts, at most 512 responses concurrently.",
}
NUMBERS = (
  "fits",
  "peak, GiB",
  "step, s",
  "tokens/s/chip",
  "MFU",
  "chip-hours",
  "cost, $",
)
MESH = "mesh and microbatches"


def _tabulate_slices(chosen: Sequence[Point], rows: Rows) -> str:
  lines = []
  for point in chosen:
    row, chips = rows[point.name], topologies.parse_topology(point.topology).chips
    lines.append(
      [point.topology, chips, row["rows"], *format_numbers(row), format_mesh(row)]
    )
  return markdown_table(lines, ["slice", "chips", "rows", *NUMBERS, MESH])


def _tabulate_curve(chosen: Sequence[Point], rows: Rows, key: str) -> str:
  lines = []
  for point in chosen:
    row = rows[point.name]
    own = [point.method, point.topology, _get_value(point)]
    lines.append([*own, *format_numbers(row), format_mesh(row)])
  return markdown_table(lines, ["method", "slice", key, *NUMBERS, MESH])


def _describe_estimates(rows: Rows) -> list[str]:
  """Returns the section that compares estimated with compiled memory."""
  ratios = [
    f["peak"] / f["estimate"]
    for row in rows.values()
    for f in row["functions"]
    if f["compile_s"] and not f["refused"]
  ]
  if not ratios:
    return []
  near = sum(abs(ratio - 1) <= 0.25 for ratio in ratios)
  return [
    "## Estimates of memory, and compilers",
    "",
    f"Of the {len(ratios)} functions that were compiled for the rows above, the "
    f"median peak is {statistics.median(ratios):.2f} times the estimate from shapes. "
    f"The range is {min(ratios):.2f} to {max(ratios):.2f}. {near} peaks are within "
    "25 % of the estimate.",
  ]


def _get_value(point: Point) -> int:
  """Returns the frames or the responses of a curve's point, from its name."""
  return int(point.name.rpartition("_")[2])


def is_compiled(row: PlanRow) -> bool:
  """Returns whether a plan was compiled, not only estimated."""
  return any(f["compile_s"] for f in row["functions"])


def format_numbers(row: PlanRow) -> list[str]:
  """Returns memory, time and cost; a step that does not fit has no time."""
  worst = max(row["functions"], key=lambda f: f["peak"] / f["limit"])
  peak = f"{worst['peak'] / GIB:.1f} of {worst['limit'] / GIB:.1f}"
  fits = ("yes" if row["fits"] else f"**no**: {worst['function']}") + (
    "" if is_compiled(row) else ", estimate"
  )
  if not row["fits"]:
    return [fits, peak, *["-"] * 5]
  return [
    fits,
    peak,
    f"{row['step_s']:.1f}",
    f"{row['tokens_s_chip']:,.0f}",
    f"{row['mfu']:.0%}",
    f"{_count_chip_hours(row):,.0f}",
    f"{_compute_cost(row):,.0f}",
  ]


def format_mesh(row: PlanRow) -> str:
  """Returns the mesh sizes other than 1 and the microbatches."""
  parts = [flag.removeprefix("--config.") for flag in row["line"].split()]
  parts = [part.removeprefix("mesh.") for part in parts if not part.endswith("=1")]
  return ", ".join(part.rpartition(".")[2] for part in parts) or "all 1"


def _count_chip_hours(row: PlanRow) -> float:
  """Computes the chip-hours of 1,000 steps."""
  return row["step_s"] * topologies.parse_topology(row["topology"]).chips * 1000 / 3600


def _compute_cost(row: PlanRow) -> float:
  return _count_chip_hours(row) * row["cost"] / row["chip_hours"]


# Figures: step time above, cost below; hollow points are estimates.

_COLORS = {  # Distinct for color-blind readers, too.
  "v5e": "#4477aa", "v5p": "#228833", "v6e": "#aa3377", "h200": "#cc8800",
  "a100": "#66aabb",
}  # fmt: skip
_LABELS = {"ppo": "PPO", "grpo_rank": "GRPO_rank", "dpo": "DPO", "sft": "SFT"}
_STYLES = {"ppo": "o-", "grpo_rank": "s--"}


def draw_figures(rows: Rows, folder: pathlib.Path) -> None:
  """Draws scaling_chips.png and scaling_curves.png with the plans that fit."""
  fit = {name: row for name, row in rows.items() if row["fits"]}
  save_figure(_draw_chips(fit), folder / "scaling_chips.png")
  save_figure(_draw_curves(fit), folder / "scaling_curves.png")


def _draw_chips(rows: Rows):
  """Draws a column for each method and a line for each kind of chip."""
  figure = create_figure(10, 5, "constrained")
  every = figure.subplots(2, len(METHODS), sharex=True, sharey="row")
  for column, method in enumerate(METHODS):
    for kind, color in _COLORS.items():
      chosen = [
        (topologies.parse_topology(name).chips, rows[f"{method}_{name}"])
        for name in SLICES
        if topologies.parse_topology(name).kind == kind and f"{method}_{name}" in rows
      ]
      _plot_line(every[:, column], chosen, "o-", color, kind)
    every[0, column].set_title(_LABELS[method])
    every[1, column].set_xlabel("chips")
    _set_ticks(every[:, column], (4, 8, 16, 32, 64, 256))
  _finish(figure, every, [every[0, 0]])
  return figure


def _draw_curves(rows: Rows):
  """Draws frames on the left, groups on the right, a line per method and slice."""
  figure = create_figure(8, 5, "constrained")
  every = figure.subplots(2, 2, sharey="row")
  for name in FIRST:
    kind = topologies.parse_topology(name).kind
    for method, style in _STYLES.items():
      chosen = [(n, f"frames_{method}_{name}_{n}") for n in FRAMES]
      known = [(n, rows[key]) for n, key in chosen if key in rows]
      _plot_line(every[:, 0], known, style, _COLORS[kind], f"{_LABELS[method]}, {name}")
    chosen = [(n, f"group_{name}_{n}") for n in GROUPS]
    known = [(n, rows[key]) for n, key in chosen if key in rows]
    style = _STYLES["grpo_rank"]
    _plot_line(
      every[:, 1], known, style, _COLORS[kind], f"{_LABELS['grpo_rank']}, {name}"
    )
  every[1, 0].set_xlabel("frames")
  every[1, 1].set_xlabel("responses of a group")
  _set_ticks(every[:, 0], FRAMES)
  _set_ticks(every[:, 1], GROUPS)
  _finish(figure, every, every[0])
  return figure


def _plot_line(
  pair, chosen: Sequence[tuple[int, PlanRow]], style, color, label
) -> None:
  """Plots step time in the upper and cost in the lower of a pair of axes."""
  if not chosen:
    return
  xs = [x for x, _ in chosen]
  style_options = dict(color=color, label=label, markersize=5)
  for axes, measure in zip(
    pair, (lambda row: row["step_s"], _compute_cost), strict=True
  ):
    axes.loglog(xs, [measure(row) for _, row in chosen], style, **style_options)
    estimates = [(x, measure(row)) for x, row in chosen if not is_compiled(row)]
    for x, y in estimates:  # Hollow.
      axes.plot(x, y, style[0], color=color, markersize=5, markerfacecolor="white")


def _set_ticks(pair, values: Sequence[int]) -> None:
  from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

  for axes in pair:
    axes.set_yscale("log")  # Also for axes without lines.
    axes.set_xticks(values, map(str, values))
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _finish(figure, every, with_legends) -> None:
  every[0, 0].set_ylabel("seconds of a step")
  every[1, 0].set_ylabel("$ of 1,000 steps")
  for axes in with_legends:
    if axes.lines:
      axes.legend(fontsize=8)
