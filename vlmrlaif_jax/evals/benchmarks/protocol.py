"""The declaration of a benchmark, the table of all, and functions that they share.

A module of this package that has a tuple `BENCHMARKS` declares benchmarks. The config,
the validation and the stage `eval` read the table. A case that cannot be measured is
counted by its reason, never as 0.
"""

import collections
import functools
import hashlib
import importlib
import json
import os
import pathlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.video import VideoPath, name_of
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Interval, Resampling
from vlmrlaif_jax.evals.text_similarity import STATEMENTS, Likeness
from vlmrlaif_jax.feedback.pairwise_judge import Outcome, Pair

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
# Why there is no number: the model gave no answer, or the judge no reply, or none that
# can be read.
FAULTS = ("unanswered", "unjudged", "unparsed")
TEXTS = ("*.json", "*.txt", "query/*.json")  # What a benchmark's folder may hold.


class Question(NamedTuple):
  """What a model is asked about a video."""

  id: str  # Of its own in the benchmark; with it the file that keeps the answer.
  video: VideoPath
  text: str
  options: tuple[str, ...] = ()  # Of a multiple choice.


class Reply(NamedTuple):
  """An answer of a model."""

  text: str
  stopped: bool = True  # Whether it came to its end within its length.


class Model(NamedTuple):
  """What a benchmark may ask of a policy."""

  # Returns a reply to each question; None where the video cannot be read or the prompt
  # is too long.
  replies: Callable[[Sequence[Question]], Sequence[Reply | None]]
  # (name of the file that keeps them, questions) -> the log-probability of each option,
  # in nats, or None as above. Benchmarks without options do not need it.
  choose: Callable[[str, Sequence[Question]], list[list[float] | None]] | None = None
  alike: Likeness = STATEMENTS  # What compares texts.
  # The reward model's score of a text as the answer to each question, if there is one.
  reward: Callable[[Sequence[Question], Sequence[str]], Iterable[float]] | None = None

  def answer(self, questions: Sequence[Question]) -> list[str | None]:
    """Returns the text of each reply."""
    return [reply and reply.text for reply in self.replies(questions)]


class Item(NamedTuple):
  """A record of a benchmark's file: a question and its right answer."""

  question: Question
  answer: str
  kind: str = ""  # Each measure is also given by kind, where there are kinds.
  content: str = ""  # What the video holds, for a judge.
  rival: str = ""  # An answer to compare with.


class Case(NamedTuple):
  """What a judge is to rate: answers of a model, held against the right one."""

  id: str
  video: VideoPath
  prompt: str  # All that a judge is told.
  answer: str  # The right one.
  said: tuple[str | None, ...]  # To one question, or to several of one answer.
  rival: str = ""  # An answer that it is to be compared with, if there is one.


class Judge(NamedTuple):
  """Who rates answers."""

  name: str
  # All that its replies depend on beside a case. "version": of a server its model, of
  # our own the weights' fingerprint.
  facts: Mapping[str, Any]
  # A reply to each case; None where there is none. No answer of a case is None.
  ask: Callable[[Sequence[Case]], list[str | None]]


class Scored(NamedTuple):
  """What became of a case."""

  id: str
  video: str  # By name_of.
  values: dict[str, float]  # By measure; empty where there is a fault.
  fault: str = ""  # Of FAULTS.
  # By measure: what the case weighs in the mean, where that is not 1.
  weights: Mapping[str, float] = {}
  right: str = ""  # The right answer, where there is one.
  details: Mapping[str, Any] = {}  # For reports: the question, the answer and more.


class Scores(NamedTuple):
  """What a benchmark finds."""

  values: dict[str, Interval]  # By measure, over the cases that have it.
  rows: list[Scored]
  counts: dict[str, int]  # "cases", and how many of them have each of FAULTS.


class Source(NamedTuple):
  """Where a benchmark's files come from, and what stands in them."""

  name: str
  url: str
  layout: str

  def told(self) -> str:
    return f"{self.name} comes from {self.url}; expected layout:\n{self.layout}"


# The rows of two policies and a judge of pairs -> the rows with what the judge says.
Compare: TypeAlias = Callable[
  [
    Sequence[Any],
    tuple[list[Scored], list[Scored]],
    Callable[[list[Pair]], list[Outcome]],
  ],
  tuple[list[Scored], list[Scored]],
]


class Benchmark(NamedTuple):
  """A benchmark, as modules of this package declare it."""

  name: str  # In `evaluate.names`; also its section of `evaluate` in a config.
  source: Source
  # Reads the files that the settings name. Raises FileNotFoundError or ValueError if
  # they are missing or not of the source's layout. None: there are no files, and the
  # items are the held-out examples of the run's data.
  load: Callable[[ConfigDict], Sequence[Any]] | None
  # Returns what became of each case, from the items, whom to ask and the settings.
  run: Callable[[Sequence[Any], Model, Judge, ConfigDict], list[Scored]]
  settings: Mapping[str, Any] = {}  # Besides `questions` and `videos`, by default.
  by: str = "judge"  # What decides on an answer: "judge", "rules" or "likeness".
  prompts: Mapping[str, str] = {}  # Texts that a judge or the policy receives.
  files: tuple[str, ...] = ("questions",)  # Settings that name files to read.
  shares: tuple[str, ...] = ()  # Measures that a table shows in per cent.
  # Writes the files of the embedded world into a folder, from examples and the folder
  # of their videos, and returns the value of `questions`. None if the world has none.
  world: Callable[[pathlib.Path, Sequence[Example], str], pathlib.Path] | None = None
  # Raises ValueError if a setting has a wrong value.
  check: Callable[[ConfigDict], None] = lambda config: None
  # Has a judge compare the answers of two policies, if the setting `judge` is True.
  compare: Compare | None = None

  def default_config(self) -> ConfigDict:
    """Returns its section of a config, with the paths of its files empty."""
    files = {"questions": "", "videos": ""} if self.load else {}
    return ConfigDict({**files, **self.settings})


@functools.cache
def all_benchmarks() -> dict[str, Benchmark]:
  """Returns every benchmark by its name."""
  package = importlib.import_module("vlmrlaif_jax.evals.benchmarks")
  found = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
  modules = [importlib.import_module(each.name) for each in found]
  declared = [vars(module).get("BENCHMARKS", ()) for module in modules]
  return {benchmark.name: benchmark for each in declared for benchmark in each}


# Files.


def read_list(
  path: pathlib.Path, keys: Iterable[str], source: Source
) -> list[dict[str, Any]]:
  """The records of a JSON list, or in a .jsonl of its lines, each with these keys.

  Raises:
    FileNotFoundError, ValueError: it is not there, or not of this layout; either says
      where the benchmark comes from.
  """
  if not path.is_file():
    raise FileNotFoundError(f"no file at {path}: {source.told()}")
  try:
    lines = path.suffix == ".jsonl"
    rows = jsonl.read_jsonl(path) if lines else json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON ({error}): {source.told()}") from None
  if not isinstance(rows, list) or not rows:
    raise ValueError(f"{path} must hold a list of records: {source.told()}")
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise ValueError(f"{path}, record {number} is no record: {source.told()}")
    lacking = [key for key in keys if key not in row]
    if lacking:
      raise ValueError(f"{path}, record {number} has no {lacking}: {source.told()}")
  return rows


def find_video(folder: str | os.PathLike, name: str) -> str:
  """Where the video of a name lies: a folder of frames or a file, with or without its
  suffix, and with or without ActivityNet's "v_"; where it would lie, if it does not.
  """
  place = pathlib.Path(folder)
  for stem in (name, f"v_{name}"):
    for suffix in ("", *SUFFIXES):
      path = place / f"{stem}{suffix}"
      if path.exists():
        return str(path)
  return str(place / f"{name}")


def file_of(address: str) -> str:
  """Returns the file's name of an address such as "https://a.org/b/c.jpg"."""
  return address.rsplit("/", 1)[-1] if "://" in address else address


def content(benchmark: Benchmark, config: ConfigDict) -> str:
  """Returns a hash of a benchmark's files, and of the files of TEXTS in its folders."""
  read = []
  for given in (config[name] for name in benchmark.files):
    for name in (given,) if isinstance(given, str) else given:
      path = pathlib.Path(name)
      inside = sorted(file for pattern in TEXTS for file in path.glob(pattern))
      read += inside if path.is_dir() else [path]
  digest = hashlib.sha256(b"".join(file.read_bytes() for file in read))
  return digest.hexdigest()[:16]


# What became of cases.


def told(
  question: Question, values: dict[str, float] | None, right: str = ""
) -> Scored:
  """Returns what became of a question that no judge is asked about.

  Args:
    question: the question.
    values: None if it was not answered.
    right: the right answer.
  """
  fault = "unanswered" if values is None else ""
  return Scored(question.id, name_of(question.video), values or {}, fault, right=right)


def tallied(
  question: Question,
  tallies: Mapping[str, tuple[float | int, float | int]] | None,
  right: str = "",
) -> Scored:
  """Returns a case that adds (above, below) to ratios of sums.

  Its value is its own ratio, weighted by below: where below is 0, it weighs nothing.

  Args:
    question: the question.
    tallies: by measure; None if it was not answered.
    right: the right answer.
  """
  if tallies is None:
    return told(question, None, right)
  values = {name: above / (below or 1) for name, (above, below) in tallies.items()}
  weights = {name: float(below) for name, (_, below) in tallies.items()}
  return told(question, values, right)._replace(weights=weights)


def by_kind(rows: Sequence[Scored], kinds: Sequence[str]) -> list[Scored]:
  """Returns the rows with each value also as "KIND.MEASURE", where there is a kind."""
  return [
    row._replace(
      values=row.values
      | {f"{kind}.{name}": value for name, value in row.values.items() if kind}
    )
    for row, kind in zip(rows, kinds, strict=True)
  ]


def scores_of(rows: Sequence[Scored], how: Resampling) -> Scores:
  """Returns the weighted mean of each measure, measures by kind last.

  Questions about one video are drawn together.

  Args:
    rows: what became of each case.
    how: the bootstrap; its groups are those of the rows.
  """
  names = dict.fromkeys(name for row in rows for name in row.values)
  values = {}
  for measure in sorted(names, key=lambda name: "." in name):
    having = [row for row in rows if measure in row.values]
    weights = np.array([row.weights.get(measure, 1.0) for row in having])
    if weights.sum():
      values[measure] = bootstrap.ratio_interval(
        np.array([row.values[measure] for row in having]) * weights,
        weights,
        how._replace(groups=[row.video for row in having]),
      )._replace(n=int((weights > 0).sum()))
  faults = collections.Counter(row.fault for row in rows)
  counts = {"cases": len(rows), **{fault: faults[fault] for fault in FAULTS}}
  return Scores(values, list(rows), counts)


def prompt_hash(prompts: Mapping[str, str]) -> str:
  """Names what a judge is told."""
  return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]
