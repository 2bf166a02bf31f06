"""What was planned of all points, as docs/scaling.md and its figures."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from perf.pages import create_figure, save_figure
from tools.scaling_points import FIRST, FRAMES, GROUPS, METHODS, SLICES, Point, points
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.planner import topologies

GIB = 2**30

Row = Mapping[str, Any]  # Of launch/plan.py.
Rows = Mapping[str, Row]  # By the name of a point, the best way to run it.

HEAD = """# Scaling, planned

What the recipes at 7B take on slices that nobody rented. Nothing here was run on an
accelerator: memory is what the accelerators' compilers say, time is what follows from
operations, bytes and messages. How both are computed, and how far they are off where
that can be checked, stands in [planning.md](planning.md).

Assumed:

- 50 frames of 576 patches, 768 tokens of prompt and 896 of response, all responses at
  their longest, LoRA of rank 64 on bfloat16 weights, remat; splash attention on TPUs,
  cuDNN's on GPUs.
- Programs reach 60 % of a chip's operations a second, 80 % of its memory's bandwidth
  and 70 % of its links': `reached` in `configs/prices.py`. None of it was measured.
- List prices on demand, of {date} (same file). Cost is of 1,000 steps.
- GRPO_rank samples 5 responses to each of 256 prompts, 320 at a time
  (`grpo.slots=320`): the cache of all at once would take 1 TiB. A group's responses
  share one copy of their prompt.
- Rows are prompts, pairs or examples of a step. v5e-16 has a second line with 64, and
  GRPO_rank there 160 responses at a time.
- Of all meshes and microbatches, the fastest by the shapes' own estimate of those that
  fit; on GPUs the fastest by the compiler's word of three such. "Fits" leaves 12 % of a
  device's memory free. Where it says **estimate**, nothing
  was compiled: peak and collectives are those of the shapes, and times come out lower,
  as compilers put in more collectives than a model of them knows of. An estimated "no"
  that is near the memory may yet fit.

```bash
pip install -e ".[plan,plan-gpu,bench]"
# All of it: estimates take minutes, compiling hours; what was killed goes on.
python tools/scaling.py --out=runs/scaling
# A row:
python launch/plan.py {command}
```
"""


def write(path: pathlib.Path, rows: Rows) -> None:
  """The document, and its figures beside it, in figures/."""
  path.parent.mkdir(parents=True, exist_ok=True)
  draw(rows, path.parent / "figures")
  path.write_text(document(rows))


def document(rows: Rows) -> str:
  """docs/scaling.md, of the points there are, and what is missing."""
  from configs import prices

  known = [point for point in points() if point.name in rows]
  first = points()[0]
  command = " \\\n  ".join(first.command())
  lines = [HEAD.format(date=prices.get_config().date, command=command)]
  lines += ["![Step time and cost against chips](figures/scaling_chips.png)", ""]
  lines += ["Hollow points are estimates. A line joins slices of one kind of chip.", ""]
  for name, method in METHODS.items():
    own = [point for point in known if point.name.startswith(f"{name}_")]
    own.sort(key=lambda point: SLICES.index(point.topology))
    lines += [f"## {method.title}", "", _slices(own, rows), ""]
  lines += ["![Step time and cost against frames and the size of a group]"
            "(figures/scaling_curves.png)", ""]  # fmt: skip
  for title, key in (("Frames", "frames"), ("Responses of a group", "group")):
    own = [point for point in known if point.name.startswith(f"{key}_")]
    lines += [f"## {title}", "", _ABOUT[key], "", _curve(own, rows, key), ""]
  lines += [*_estimates(rows), ""]
  if missing := [point.name for point in points() if point.name not in rows]:
    lines += ["## Missing", "", "Not planned yet: " + ", ".join(missing) + ".", ""]
  return "\n".join(lines).rstrip() + "\n"


_ABOUT = {
  "frames": (
    "128 prompts. A prompt has a token for each frame beside the 576 of places, so "
    "that frames cost little more than their encoding and projecting."
  ),
  "group": "GRPO_rank, 64 prompts, at most 512 responses at a time.",
}
_NUMBERS = (
  "fits",
  "peak, GiB",
  "step, s",
  "tokens/s/chip",
  "MFU",
  "chip-hours",
  "cost, $",
)
_WAY = "mesh and microbatches"


def _slices(chosen: Sequence[Point], rows: Rows) -> str:
  lines = []
  for point in chosen:
    row, chips = rows[point.name], topologies.parse_topology(point.topology).chips
    lines.append([point.topology, chips, row["rows"], *_numbers(row), _way(row)])
  return markdown_table(lines, ["slice", "chips", "rows", *_NUMBERS, _WAY])


def _curve(chosen: Sequence[Point], rows: Rows, key: str) -> str:
  lines = []
  for point in chosen:
    row = rows[point.name]
    own = [point.method, point.topology, _value(point)]
    lines.append([*own, *_numbers(row), _way(row)])
  return markdown_table(lines, ["method", "slice", key, *_NUMBERS, _WAY])


def _estimates(rows: Rows) -> list[str]:
  """How far the shapes' own peak is from the compiler's."""
  made = [
    f["peak"] / f["estimate"]
    for row in rows.values()
    for f in row["functions"]
    if f["compile_s"] and not f["refused"]
  ]
  if not made:
    return []
  near = sum(abs(ratio - 1) <= 0.25 for ratio in made)
  return [
    "## Estimates of memory, and compilers",
    "",
    f"Of the {len(made)} functions that were compiled for the rows above, the "
    f"compiler's peak is {statistics.median(made):.2f} times the shapes' own estimate "
    f"in the median, from {min(made):.2f} to {max(made):.2f}; of {near} it is within a "
    "quarter.",
  ]


def _value(point: Point) -> int:
  """Of a curve: the frames, or the responses, that its name ends with."""
  return int(point.name.rpartition("_")[2])


def compiled(row: Row) -> bool:
  return any(f["compile_s"] for f in row["functions"])


def _numbers(row: Row) -> list[str]:
  """Returns memory, time and cost; a step that does not fit has no time."""
  worst = max(row["functions"], key=lambda f: f["peak"] / f["limit"])
  peak = f"{worst['peak'] / GIB:.1f} of {worst['limit'] / GIB:.1f}"
  told = ("yes" if row["fits"] else f"**no**: {worst['function']}") + (
    "" if compiled(row) else ", estimate"
  )
  if not row["fits"]:
    return [told, peak, *["-"] * 5]
  return [
    told,
    peak,
    f"{row['step_s']:.1f}",
    f"{row['tokens_s_chip']:,.0f}",
    f"{row['mfu']:.0%}",
    f"{_hours(row):,.0f}",
    f"{_cost(row):,.0f}",
  ]


def _way(row: Row) -> str:
  """Sizes of the mesh other than 1, and microbatches."""
  parts = [flag.removeprefix("--config.") for flag in row["line"].split()]
  parts = [part.removeprefix("mesh.") for part in parts if not part.endswith("=1")]
  return ", ".join(part.rpartition(".")[2] for part in parts) or "all 1"


def _hours(row: Row) -> float:
  """Chip-hours of 1,000 steps."""
  return row["step_s"] * topologies.parse_topology(row["topology"]).chips * 1000 / 3600


def _cost(row: Row) -> float:
  return _hours(row) * row["cost"] / row["chip_hours"]


# Figures: step time above, cost below; hollow points are estimates.

_COLOURS = {  # Told apart by people who see no red, too.
  "v5e": "#4477aa", "v5p": "#228833", "v6e": "#aa3377", "h200": "#cc8800",
  "a100": "#66aabb",
}  # fmt: skip
_LABELS = {"ppo": "PPO", "grpo_rank": "GRPO_rank", "dpo": "DPO", "sft": "SFT"}
_STYLES = {"ppo": "o-", "grpo_rank": "s--"}


def draw(rows: Rows, folder: pathlib.Path) -> None:
  """Draws scaling_chips.png and scaling_curves.png, of what fits."""
  fit = {name: row for name, row in rows.items() if row["fits"]}
  save_figure(_draw_chips(fit), folder / "scaling_chips.png")
  save_figure(_draw_curves(fit), folder / "scaling_curves.png")


def _draw_chips(rows: Rows):
  """A column for each method, a line for each kind of chip."""
  figure = create_figure(10, 5, "constrained")
  every = figure.subplots(2, len(METHODS), sharex=True, sharey="row")
  for column, method in enumerate(METHODS):
    for kind, colour in _COLOURS.items():
      chosen = [
        (topologies.parse_topology(name).chips, rows[f"{method}_{name}"])
        for name in SLICES
        if topologies.parse_topology(name).kind == kind and f"{method}_{name}" in rows
      ]
      _line(every[:, column], chosen, "o-", colour, kind)
    every[0, column].set_title(_LABELS[method])
    every[1, column].set_xlabel("chips")
    _ticks(every[:, column], (4, 8, 16, 32, 64, 256))
  _finish(figure, every, [every[0, 0]])
  return figure


def _draw_curves(rows: Rows):
  """Frames on the left, groups on the right; a line for each method and slice."""
  figure = create_figure(8, 5, "constrained")
  every = figure.subplots(2, 2, sharey="row")
  for name in FIRST:
    kind = topologies.parse_topology(name).kind
    for method, style in _STYLES.items():
      chosen = [(n, f"frames_{method}_{name}_{n}") for n in FRAMES]
      known = [(n, rows[key]) for n, key in chosen if key in rows]
      _line(every[:, 0], known, style, _COLOURS[kind], f"{_LABELS[method]}, {name}")
    chosen = [(n, f"group_{name}_{n}") for n in GROUPS]
    known = [(n, rows[key]) for n, key in chosen if key in rows]
    style = _STYLES["grpo_rank"]
    _line(every[:, 1], known, style, _COLOURS[kind], f"{_LABELS['grpo_rank']}, {name}")
  every[1, 0].set_xlabel("frames")
  every[1, 1].set_xlabel("responses of a group")
  _ticks(every[:, 0], FRAMES)
  _ticks(every[:, 1], GROUPS)
  _finish(figure, every, every[0])
  return figure


def _line(pair, chosen: Sequence[tuple[int, Row]], style, colour, label) -> None:
  """Step time in the upper of a pair of axes, cost in the lower."""
  if not chosen:
    return
  xs = [x for x, _ in chosen]
  given = dict(color=colour, label=label, markersize=5)
  for axes, of in zip(pair, (lambda row: row["step_s"], _cost), strict=True):
    axes.loglog(xs, [of(row) for _, row in chosen], style, **given)
    guessed = [(x, of(row)) for x, row in chosen if not compiled(row)]
    for x, y in guessed:  # Hollow.
      axes.plot(x, y, style[0], color=colour, markersize=5, markerfacecolor="white")


def _ticks(pair, values: Sequence[int]) -> None:
  from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

  for axes in pair:
    axes.set_yscale("log")  # Where nothing is drawn, too.
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
