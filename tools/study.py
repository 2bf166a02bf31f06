"""A study: runs of recipes that differ in one setting, once for each seed.

Every run is a command of launch/run.py in a workdir of its own, ARM-SEED; stages that
it has in common with another are links into that one's workdir.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.files import read_json, write_json
from vlmrlaif_jax.evals.summary import HELD_OUT

WORLD = ("world", "features")  # What every run of a seed shares.


class Arm(NamedTuple):
  """A run of a recipe, to be made once for each seed.

  In flags, {ARM} is the workdir of that arm's run of the same seed, {self} its own,
  {study} the folder that holds all.
  """

  name: str
  recipe: str = "ppo.py"  # A file in configs/, and its preset.
  flags: tuple[str, ...] = ()  # Settings, as "label.context=none".
  start: str = ""  # The arm whose world it lives in, and
  shared: tuple[str, ...] = ()  # of which it shares these stages.
  kinds: tuple[str, ...] = ()  # Of questions in the SFT records; () for all.
  pairs: float = 1.0  # Share of the starting arm's preferences.
  export: str = ""  # A stage to write out as a checkpoint, to "export" in the workdir.
  once: bool = False  # Not for each seed: its workdir is {study}/NAME.
  made: str = "report.html"  # There, in the workdir, once the run is over.


class Row(NamedTuple):
  """A line of a table: a policy of an arm."""

  title: str
  arm: str
  policy: str  # As in eval/results.json: "sft", "ppo", ...
  paper: str = ""  # What the paper has there.


class Table(NamedTuple):
  """A question and the arms that answer it; the first row is the baseline."""

  name: str
  title: str
  paper: str  # What the paper's figures are.
  rows: tuple[Row, ...]


class Score(NamedTuple):
  """A line of a table of benchmarks."""

  title: str
  benchmark: str
  measure: str
  scale: int = 100  # To the unit that it is shown in.
  paper: tuple[str, str] = ("", "")  # What the paper has before and after.


class Scores(NamedTuple):
  """A table of what an arm's stage `eval` says of two policies."""

  name: str
  title: str
  arm: str
  policies: tuple[str, str]
  rows: tuple[Score, ...]


class Job(NamedTuple):
  """A run, or an export of one, that there is to make."""

  name: str  # ARM-SEED.
  arm: Arm
  seed: int
  folder: pathlib.Path  # Its workdir.
  command: list[str]
  done: pathlib.Path  # There once it is made.


def jobs(arms: Sequence[Arm], seeds: Sequence[int], root: pathlib.Path) -> list[Job]:
  """All there is to do, seed after seed, in the arms' order.

  Raises:
    ValueError: an arm starts from one that does not stand before it.
  """
  found: list[Job] = []
  for seed in seeds:
    for number, arm in enumerate(arms):
      before = {other.name for other in arms[:number]}
      if arm.start and arm.start not in before:
        raise ValueError(
          f"{arm.name} starts from {arm.start!r}, which is not before it"
        )
      if not arm.once or seed == seeds[0]:
        found += _of_arm(arm, seed, root)
  return found


def _of_arm(arm: Arm, seed: int, root: pathlib.Path) -> Iterable[Job]:
  name = arm.name if arm.once else f"{arm.name}-{seed}"
  folder = root / name
  places = _Places(root, seed, folder)
  line = [
    "launch/run.py",
    f"--config=configs/{arm.recipe}",
    *([] if arm.once else [f"--config.seed={seed}"]),
    *(f"--config.{flag.format_map(places)}" for flag in (*arm.flags, *_given(arm))),
    f"--workdir={folder}",
  ]
  yield Job(name, arm, seed, folder, line, folder / arm.made)
  if arm.export:
    out = folder / "export"
    line = [
      "launch/export.py",
      f"--workdir={folder}",
      f"--stage={arm.export}",
      f"--out={out}",
      "--dtype=float32",
    ]
    yield Job(f"{name}: export", arm, seed, folder, line, out / "config.json")


def _given(arm: Arm) -> list[str]:
  """Settings that name what prepare() writes."""
  flags = []
  if arm.kinds:
    flags += [
      "data.records={self}/data/sft.jsonl",
      "data.benchmark={self}/world/benchmark.jsonl",
      "data.videos={self}/world/videos",
    ]
  if arm.pairs < 1:
    flags.append("rm.preferences={self}/data/preferences.jsonl")
  return flags


class _Places(dict):
  """{ARM}: the workdir of an arm's run of a seed."""

  def __init__(self, root: pathlib.Path, seed: int, own: pathlib.Path):
    super().__init__(study=str(root), self=str(own))
    self.root, self.seed = root, seed

  def __missing__(self, arm: str) -> str:
    return str(self.root / f"{arm}-{self.seed}")


def prepare(job: Job) -> None:
  """Makes a job's workdir: links to the stages that it shares, and its data.

  Raises:
    FileNotFoundError: what it starts from has not been made.
  """
  arm, folder = job.arm, job.folder
  if not arm.start:
    return
  start = folder.parent / f"{arm.start}-{job.seed}"
  folder.mkdir(parents=True, exist_ok=True)
  for stage in (*WORLD, *arm.shared):
    if not (start / stage).exists():
      raise FileNotFoundError(f"{job.name} starts from {start / stage}, which is not")
    if not (folder / stage).exists():
      (folder / stage).symlink_to(pathlib.Path("..") / start.name / stage)
  (folder / "data").mkdir(exist_ok=True)
  if arm.kinds:
    rows = jsonl.read_jsonl(start / "world" / "sft.jsonl")
    chosen = [row for row in rows if row["truth"]["kind"] in arm.kinds]
    jsonl.write_records(folder / "data" / "sft.jsonl", chosen)
  if arm.pairs < 1:
    rows = jsonl.read_jsonl(start / "label" / "preferences.jsonl")
    chosen = subset(rows, arm.pairs, job.seed)
    jsonl.write_records(folder / "data" / "preferences.jsonl", chosen)


def subset(rows: Sequence[dict], share: float, seed: int) -> list[dict]:
  """A random share of rows, in their order; a smaller one is part of a larger."""
  order = np.random.default_rng([seed, 11]).permutation(len(rows))
  return [rows[i] for i in sorted(order[: round(share * len(rows))])]


# What came out.


def value(
  folder: pathlib.Path, policy: str, measure: str, benchmark: str = HELD_OUT
) -> float | None:
  """A mean of eval/results.json; None if it is not there."""
  found = read_json(folder / "eval" / "results.json", default={})
  policies = found.get(benchmark, {}).get("policies", {})
  return policies.get(policy, {}).get(measure, {}).get("mean")


def of_stage(folder: pathlib.Path, stage: str, name: str) -> float | None:
  """A number of a stage's summary; None if it is not there."""
  return (
    read_json(folder / stage / "done.json", default={}).get("summary", {}).get(name)
  )


def note_times(root: pathlib.Path, name: str, seconds: float) -> None:
  """Adds to what each job took, times.json of the study."""
  path = root / "times.json"
  write_json(path, read_json(path, default={}) | {name: round(seconds, 1)})
