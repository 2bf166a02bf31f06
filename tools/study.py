"""A study: runs of recipes that differ in one setting, once for each seed.

Every run is a command of launch/run.py in its own workdir, ARM-SEED. Stages that it
shares with another run are links into that run's workdir.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.files import read_json, write_json
from vlmrlaif_jax.evals.summary import HELD_OUT

WORLD = ("world", "features")  # Folders that all runs of a seed share.


class Arm(NamedTuple):
  """A run of a recipe for each seed.

  In flags, {ARM} is the workdir of that arm's run with the same seed, {self} the run's
  own workdir, and {study} the folder of all workdirs.
  """

  name: str
  recipe: str = "ppo.py"  # File in configs/, with its preset.
  flags: tuple[str, ...] = ()  # Settings, such as "label.context=none".
  start: str = ""  # Arm whose world and stages are shared; "": none.
  shared: tuple[str, ...] = ()  # Stages that are shared with the arm `start`.
  kinds: tuple[str, ...] = ()  # Kinds of questions in the SFT records; (): all.
  pairs: float = 1.0  # Share of the preferences of the arm `start`, from 0 to 1.
  export: str = ""  # Stage to export to the folder "export" of the workdir; "": none.
  once: bool = False  # Whether there is one run for all seeds, in {study}/NAME.
  output: str = "report.html"  # File in the workdir that exists after the run.


class Row(NamedTuple):
  """A line of a table: a policy of an arm."""

  title: str
  arm: str
  policy: str  # Name in eval/results.json: "sft", "ppo", ...
  paper: str = ""  # The paper's value.


class Table(NamedTuple):
  """A research question and the arms that answer it; the first row is the baseline."""

  name: str
  title: str
  paper: str  # Measure of the paper's values.
  rows: tuple[Row, ...]


class Score(NamedTuple):
  """A line of a table of benchmarks."""

  title: str
  benchmark: str
  measure: str
  scale: int = 100  # Factor to the unit of the table.
  paper: tuple[str, str] = ("", "")  # The paper's values before and after.


class Scores(NamedTuple):
  """A table of two policies on the benchmarks of an arm's stage `eval`."""

  name: str
  title: str
  arm: str
  policies: tuple[str, str]
  rows: tuple[Score, ...]


class Job(NamedTuple):
  """A command of the study: a run, or the export of its checkpoint."""

  name: str  # ARM-SEED, for exports followed by ": export".
  arm: Arm
  seed: int
  folder: pathlib.Path  # Workdir.
  command: list[str]  # Arguments of the Python interpreter.
  output: pathlib.Path  # File that exists after the command.


def list_jobs(
  arms: Sequence[Arm], seeds: Sequence[int], root: pathlib.Path
) -> list[Job]:
  """Returns all jobs, seed by seed, in the order of the arms.

  Args:
    arms: The arms. An arm comes after the arm that it starts from.
    seeds: The seeds. An arm with `once` runs with the first seed.
    root: Folder with the workdirs.

  Raises:
    ValueError: An arm starts from one that does not come before it.
  """
  jobs: list[Job] = []
  for seed in seeds:
    for number, arm in enumerate(arms):
      before = {other.name for other in arms[:number]}
      if arm.start and arm.start not in before:
        raise ValueError(
          f"the arm {arm.name} starts from {arm.start!r}, which must come before it"
        )
      if not arm.once or seed == seeds[0]:
        jobs += _list_arm_jobs(arm, seed, root)
  return jobs


def _list_arm_jobs(arm: Arm, seed: int, root: pathlib.Path) -> Iterable[Job]:
  name = arm.name if arm.once else f"{arm.name}-{seed}"
  folder = root / name
  workdirs = _Workdirs(root, seed, folder)
  line = [
    "launch/run.py",
    f"--config=configs/{arm.recipe}",
    *([] if arm.once else [f"--config.seed={seed}"]),
    *(
      f"--config.{flag.format_map(workdirs)}"
      for flag in (*arm.flags, *_list_data_flags(arm))
    ),
    f"--workdir={folder}",
  ]
  yield Job(name, arm, seed, folder, line, folder / arm.output)
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


def _list_data_flags(arm: Arm) -> list[str]:
  """Returns the settings with the paths of the files that `prepare` writes."""
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


class _Workdirs(dict):
  """A mapping from an arm's name to the workdir of its run with a seed."""

  def __init__(self, root: pathlib.Path, seed: int, own: pathlib.Path):
    super().__init__(study=str(root), self=str(own))
    self.root, self.seed = root, seed

  def __missing__(self, arm: str) -> str:
    return str(self.root / f"{arm}-{self.seed}")


def prepare(job: Job) -> None:
  """Creates a job's workdir with links to shared stages and with its data.

  Raises:
    FileNotFoundError: A shared stage does not exist.
  """
  arm, folder = job.arm, job.folder
  if not arm.start:
    return
  start = folder.parent / f"{arm.start}-{job.seed}"
  folder.mkdir(parents=True, exist_ok=True)
  for stage in (*WORLD, *arm.shared):
    if not (start / stage).exists():
      raise FileNotFoundError(
        f"{job.name} requires {start / stage}: run {arm.start} first"
      )
    if not (folder / stage).exists():
      (folder / stage).symlink_to(pathlib.Path("..") / start.name / stage)
  (folder / "data").mkdir(exist_ok=True)
  if arm.kinds:
    rows = jsonl.read_jsonl(start / "world" / "sft.jsonl")
    chosen = [row for row in rows if row["truth"]["kind"] in arm.kinds]
    jsonl.write_records(folder / "data" / "sft.jsonl", chosen)
  if arm.pairs < 1:
    rows = jsonl.read_jsonl(start / "label" / "preferences.jsonl")
    chosen = select_subset(rows, arm.pairs, job.seed)
    jsonl.write_records(folder / "data" / "preferences.jsonl", chosen)


def select_subset(rows: Sequence[dict], share: float, seed: int) -> list[dict]:
  """Returns a random share of rows in their order.

  With one seed, a smaller share is a subset of a larger one.
  """
  order = np.random.default_rng([seed, 11]).permutation(len(rows))
  return [rows[i] for i in sorted(order[: round(share * len(rows))])]


# Results.


def read_mean(
  folder: pathlib.Path, policy: str, measure: str, benchmark: str = HELD_OUT
) -> float | None:
  """Returns a mean from eval/results.json, or None if it was not measured."""
  results = read_json(folder / "eval" / "results.json", default={})
  policies = results.get(benchmark, {}).get("policies", {})
  return policies.get(policy, {}).get(measure, {}).get("mean")


def read_summary(folder: pathlib.Path, stage: str, name: str) -> float | None:
  """Returns a number from a stage's summary, or None if it does not exist."""
  return (
    read_json(folder / stage / "done.json", default={}).get("summary", {}).get(name)
  )


def save_time(root: pathlib.Path, name: str, seconds: float) -> None:
  """Saves the seconds that a job took in times.json of the study."""
  path = root / "times.json"
  write_json(path, read_json(path, default={}) | {name: round(seconds, 1)})
