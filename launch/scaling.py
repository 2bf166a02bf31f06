"""Plans the 7B recipes on many slices, and writes docs/scaling.md of what came out.

nice -n 10 python launch/scaling.py --out=runs/scaling

Each point is a run of launch/plan.py, one at a time, those that matter most first, kept
as a file of JSON under --out; a point that is there is not run again, so what was
killed goes on. The document is written after each, and says what is missing; --norun
only writes it. Takes hours.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from vlmrlaif_jax import topologies  # noqa: E402

OUT = flags.DEFINE_string("out", "runs/scaling", "Keeps the points.")
DOC = flags.DEFINE_string("doc", "docs/scaling.md", "Gets the tables.")
ONLY = flags.DEFINE_string("only", "", "Points whose names begin so.")
RUN = flags.DEFINE_bool("run", True, "Run points that are not there yet.")

GIB = 2**30
SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-64", "v6e-16", "v6e-256",
          "h200-8", "a100-8")  # fmt: skip
FIRST = ("v5e-64", "h200-8")  # Of the slices; curves are drawn on them.
TEXT = 142  # Tokens of a prompt, beside those of its video: one a frame, one a place.
PLACES = 576


class Method(NamedTuple):
  """A stage of a recipe, and the size of its step."""

  config: str
  stage: str
  rows: str  # The setting that says how many.
  title: str


METHODS = {  # Those that matter most first.
  "ppo": Method(
    "ppo", "ppo", "ppo.batch_size", "PPO, 7B policy, 13B reward model and critic"
  ),
  "grpo_rank": Method(
    "grpo_rank", "grpo", "grpo.batch_size", "GRPO_rank, 7B policy, 13B reward model"
  ),
  "dpo": Method("dpo", "dpo", "dpo.batch_size", "DPO, 7B"),
  "sft": Method("sft", "sft_short", "sft.batch_size", "SFT, 7B"),
}
ATTENTION = {"tpu": "splash", "cuda": "cudnn"}


class Point(NamedTuple):
  """One plan."""

  name: str
  method: str
  topology: str
  given: dict[str, object]  # Settings of the recipe.

  def command(self, out: pathlib.Path) -> list[str]:
    """The arguments of launch/plan.py."""
    method = METHODS[self.method]
    attention = ATTENTION[topologies.parse(self.topology).platform]
    return [
      f"--config=configs/{method.config}.py:7b",
      f"--topology={self.topology}",
      f"--stage={method.stage}",
      "--sweep",
      "--top=1",
      f"--json={out / f'{self.name}.json'}",
      f"--cache={out / 'cache'}",
      "--config.model.quant=none",
      f"--config.model.attention={attention}",
      *(f"--config.{key}={value}" for key, value in self.given.items()),
    ]


def points() -> list[Point]:
  """Each method on the first slices; what frames and groups cost there; all others."""
  rest = [name for name in SLICES if name not in FIRST]
  return [
    *_on_slices(FIRST),
    *(point for topology in FIRST for point in _curves(topology)),
    *_on_slices(rest),
    # What 256 at once are too many for.
    *(
      Point(f"{name}_v5e-16_64", name, "v5e-16", {method.rows: 64})
      for name, method in METHODS.items()
    ),
  ]


def _on_slices(names: Iterable[str]) -> list[Point]:
  return [
    Point(f"{name}_{topology}", name, topology, {method.rows: 256})
    for topology in names
    for name, method in METHODS.items()
  ]


def _curves(topology: str) -> Iterator[Point]:
  for name in ("ppo", "grpo_rank"):
    for frames in (8, 16, 32, 64):
      given = {
        METHODS[name].rows: 128,
        "model.frames": frames,
        "data.prompt_len": frames + PLACES + TEXT,
      }
      yield Point(f"frames_{name}_{topology}_{frames}", name, topology, given)
  for group in (2, 4, 8, 16):
    given = {METHODS["grpo_rank"].rows: 64, "grpo.samples": group}
    yield Point(f"group_{topology}_{group}", "grpo_rank", topology, given)


def run(todo: list[Point], out: pathlib.Path, write: Callable[[], Any]) -> None:
  """Runs points, one after the other; tells of each, and goes on after a failure.

  Args:
    write: the document, after each point.
  """
  (out / "logs").mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  for number, point in enumerate(todo):
    line = [sys.executable, str(ROOT / "launch/plan.py"), *point.command(out)]
    with (out / "logs" / f"{point.name}.log").open("w") as log:
      done = subprocess.run(line, stdout=log, stderr=log, cwd=ROOT, check=False)
    write()
    minutes = (time.monotonic() - start) / 60
    left = minutes / (number + 1) * (len(todo) - number - 1)
    what = {0: "fits", 3: "does not fit"}.get(done.returncode, "FAILED, see its log")
    print(
      f"[{number + 1}/{len(todo)}] {point.name}: {what}; {minutes:.0f} min, some "
      f"{left:.0f} to go",
      flush=True,
    )


def row_of(point: Point, out: pathlib.Path) -> dict | None:
  """The best way to run a point; None if it has not been planned."""
  path = out / f"{point.name}.json"
  return json.loads(path.read_text())[0] if path.exists() else None


def document(out: pathlib.Path) -> str:
  """docs/scaling.md, of the points there are, and what is missing."""
  found = {point.name: (point, row_of(point, out)) for point in points()}
  made = {name: each for name, each in found.items() if each[1] is not None}
  lines = [HEAD]
  for name, method in METHODS.items():
    own = [each for key, each in made.items() if key.startswith(f"{name}_")]
    own.sort(key=lambda each: SLICES.index(each[0].topology))
    lines += [f"## {method.title}", "", *_slices(own, method), ""]
  for title, prefix, key in (
    ("Frames", "frames_", "model.frames"),
    ("Responses of a group", "group_", "grpo.samples"),
  ):
    own = [each for name, each in made.items() if name.startswith(prefix)]
    lines += [f"## {title}", "", *_curve(own, key), ""]
  if missing := [point.name for point in points() if point.name not in made]:
    lines += [f"## Missing: {len(missing)} of {len(points())}", ""]
    lines += ["These have not been planned, or failed: " + ", ".join(missing) + "."]
  return "\n".join(lines).rstrip() + "\n"


HEAD = """# Scaling, planned

What the recipes at 7B take on slices that nobody rented: every function compiled for
them ahead of time, and timed by its roofline. Nothing here was run on an accelerator.
How it is computed, and how far it is off where it can be checked, stands in
[planning.md](planning.md). 50 frames of 576 patches, LoRA of rank 64 on bfloat16
weights, 768 tokens of prompt and 896 of response unless said otherwise; the best mesh
and microbatches of all. Prices are those of `configs/prices.py`.

Responses of a group share one copy of their prompt. All of it:
`python launch/scaling.py`. A row: `python launch/plan.py --sweep` with the
flags in its log.
"""


def _slices(made: list[tuple[Point, dict]], method: Method) -> list[str]:
  lines = [
    f"| slice | rows of a step | fits | peak of memory, GiB | step, s | tokens/s/chip "
    f"| MFU | chip-hours of 1,000 steps | cost | line, of {method.stage} |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for point, row in made:
    lines.append(
      f"| {point.topology} | {point.given[method.rows]} | {_fits(row)} | {_peak(row)} "
      f"| {_numbers(row)} | `{row['line']}` |"
    )
  return lines


def _curve(made: list[tuple[Point, dict]], key: str) -> list[str]:
  lines = [
    f"| method | slice | {key} | fits | peak of memory, GiB | step, s | tokens/s/chip "
    "| MFU | chip-hours of 1,000 steps | cost |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for point, row in made:
    lines.append(
      f"| {point.method} | {point.topology} | {point.given[key]} | {_fits(row)} "
      f"| {_peak(row)} | {_numbers(row)} |"
    )
  return lines


def _fits(row: dict) -> str:
  if row["fits"]:
    return "yes"
  worst = max(row["functions"], key=lambda f: f["peak"] / f["limit"])
  return f"no: {worst['function']}"


def _peak(row: dict) -> str:
  worst = max(row["functions"], key=lambda f: f["peak"] / f["limit"])
  return f"{worst['peak'] / GIB:.1f} of {worst['limit'] / GIB:.1f}"


def _numbers(row: dict) -> str:
  """Time and cost; of a step that does not fit there are none."""
  if not row["fits"]:
    return "- | - | - | - | -"
  chips = topologies.parse(row["topology"]).chips
  hours = row["step_s"] * chips * 1000 / 3600
  price = row["cost"] / row["chip_hours"]
  return (
    f"{row['step_s']:.1f} | {row['tokens_s_chip']:.0f} | {row['mfu']:.0%} "
    f"| {hours:.0f} | {hours * price:,.0f}"
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  out = pathlib.Path(OUT.value).absolute()
  todo = [
    point
    for point in points()
    if point.name.startswith(ONLY.value) and row_of(point, out) is None
  ]
  write = lambda: pathlib.Path(DOC.value).write_text(document(out))
  write()
  if RUN.value:
    run(todo, out, write)


if __name__ == "__main__":
  app.run(main)
