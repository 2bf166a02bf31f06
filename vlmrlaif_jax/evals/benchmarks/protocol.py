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
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.video import VideoPath, format_video_name
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Interval, Resampling
from vlmrlaif_jax.evals.text_similarity import STATEMENTS, Similarity

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
# Why there is no number: the model gave no answer, or the judge no reply, or none that
# can be read.
FAULTS = ("unanswered", "unjudged", "unparsed")
TEXTS = ("*.json", "*.txt", "query/*.json")  # What a benchmark's folder may hold.


class BenchmarkQuestion(NamedTuple):
  """What a model is asked about a video."""

  id: str  # Of its own in the benchmark; with it the file that keeps the answer.
  video: VideoPath
  text: str
  options: tuple[str, ...] = ()  # Of a multiple choice.


class BenchmarkReply(NamedTuple):
  """An answer of a model."""

  text: str
  stopped: bool = True  # Whether it came to its end within its length.


class BenchmarkModel(NamedTuple):
  """What a benchmark may ask of a policy."""

  # Returns a reply to each question; None where the video cannot be read or the prompt
  # is too long.
  replies: Callable[[Sequence[BenchmarkQuestion]], Sequence[BenchmarkReply | None]]
  # (name of the file that keeps them, questions) -> the log-probability of each option,
  # in nats, or None as above. Benchmarks without options do not need it.
  choose: (
    Callable[[str, Sequence[BenchmarkQuestion]], list[list[float] | None]] | None
  ) = None
  alike: Similarity = STATEMENTS  # What compares texts.
  # The reward model's score of a text as the answer to each question, if there is one.
  reward: (
    Callable[[Sequence[BenchmarkQuestion], Sequence[str]], Iterable[float]] | None
  ) = None

  def answer(self, questions: Sequence[BenchmarkQuestion]) -> list[str | None]:
    """Returns the text of each reply."""
    return [reply and reply.text for reply in self.replies(questions)]


class BenchmarkItem(NamedTuple):
  """A record of a benchmark's file: a question and its right answer."""

  question: BenchmarkQuestion
  answer: str
  kind: str = ""  # Each measure is also given by kind, where there are kinds.
  content: str = ""  # What the video holds, for a judge.
  rival: str = ""  # An answer to compare with.


class JudgeCase(NamedTuple):
  """What a judge is to rate: answers of a model, held against the right one."""

  id: str
  video: VideoPath
  prompt: str  # All that a judge is told.
  answer: str  # The right one.
  said: tuple[str | None, ...]  # To one question, or to several of one answer.
  rival: str = ""  # An answer that it is to be compared with, if there is one.


class CaseJudge(NamedTuple):
  """Who rates answers."""

  name: str
  # All that its replies depend on beside a case. "version": of a server its model, of
  # our own the weights' fingerprint.
  facts: Mapping[str, Any]
  # A reply to each case; None where there is none. No answer of a case is None.
  ask: Callable[[Sequence[JudgeCase]], list[str | None]]


class ScoredCase(NamedTuple):
  """What became of a case."""

  id: str
  video: str  # By name_of.
  values: dict[str, float]  # By measure; empty where there is a fault.
  fault: str = ""  # Of FAULTS.
  # By measure: what the case weighs in the mean, where that is not 1.
  weights: Mapping[str, float] = {}
  right: str = ""  # The right answer, where there is one.
  details: Mapping[str, Any] = {}  # For reports: the question, the answer and more.


class BenchmarkScores(NamedTuple):
  """What a benchmark finds."""

  values: dict[str, Interval]  # By measure, over the cases that have it.
  rows: list[ScoredCase]
  counts: dict[str, int]  # "cases", and how many of them have each of FAULTS.


class Source(NamedTuple):
  """Where a benchmark's files come from, and what stands in them."""

  name: str
  url: str
  layout: str

  def told(self) -> str:
    return f"{self.name} comes from {self.url}; expected layout:\n{self.layout}"


class Benchmark(NamedTuple):
  """A benchmark, as modules of this package declare it."""

  name: str  # In `evaluate.names`; also its section of `evaluate` in a config.
  source: Source
  # Reads the files that the settings name. Raises FileNotFoundError or ValueError if
  # they are missing or not of the source's layout. None: there are no files, and the
  # items are the held-out examples of the run's data.
  load: Callable[[ConfigDict], Sequence[Any]] | None
  # Returns what became of each case, from the items, whom to ask and the settings.
  run: Callable[
    [Sequence[Any], BenchmarkModel, CaseJudge, ConfigDict], list[ScoredCase]
  ]
  settings: Mapping[str, Any] = {}  # Besides `questions` and `videos`, by default.
  by: str = "judge"  # What decides on an answer: "judge", "rules" or "similarity".
  prompts: Mapping[str, str] = {}  # Texts that a judge or the policy receives.
  files: tuple[str, ...] = ("questions",)  # Settings that name files to read.
  shares: tuple[str, ...] = ()  # Measures that a table shows in per cent.
  # Writes the files of the embedded world into a folder, from examples and the folder
  # of their videos, and returns the value of `questions`. None if the world has none.
  world: Callable[[pathlib.Path, Sequence[Example], str], pathlib.Path] | None = None
  # Raises ValueError if a setting has a wrong value.
  check: Callable[[ConfigDict], None] = lambda config: None
  # Has a judge compare the answers of two policies, if the setting `judge` is True:
  # (items, rows of both, the judge of pairs) -> the rows with what it says.
  compare: Callable[..., tuple[list[ScoredCase], list[ScoredCase]]] | None = None

  def default_config(self) -> ConfigDict:
    """Returns its section of a config, with the paths of its files empty."""
    files = {
      "questions": "",  # File or folder of the questions; "": of the embedded world.
      "videos": "",  # Folder of the videos.
    }
    return ConfigDict({**(files if self.load else {}), **self.settings})


@functools.cache
def load_benchmarks() -> dict[str, Benchmark]:
  """Returns every benchmark by its name."""
  package = importlib.import_module("vlmrlaif_jax.evals.benchmarks")
  found = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
  modules = [importlib.import_module(each.name) for each in found]
  declared = [vars(module).get("BENCHMARKS", ()) for module in modules]
  return {benchmark.name: benchmark for each in declared for benchmark in each}


# Files.


def read_records_list(
  file: str | os.PathLike, keys: Iterable[str], source: Source, once: Sequence[str] = ()
) -> list[dict[str, Any]]:
  """The records of a JSON list, or in a .jsonl of its lines, each with these keys.

  Args:
    file: its path.
    keys: what each record must have.
    source: where it comes from, which errors say.
    once: keys whose values, together, may stand in one record alone.

  Raises:
    FileNotFoundError, ValueError: it is not there, or not of this layout.
  """
  path = pathlib.Path(file)
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
  names = collections.Counter(":".join(str(row[key]) for key in once) for row in rows)
  [(name, count)] = names.most_common(1)
  if once and count > 1:
    raise ValueError(f"{path} has {':'.join(once)} {name} twice")
  return rows


def make_question(
  config: ConfigDict, id: object, video: str, text: object
) -> BenchmarkQuestion:
  """Returns a question about a video, by name, of the folder of the settings."""
  return BenchmarkQuestion(str(id), find_video(config.videos, video), str(text))


def find_video(folder: str | os.PathLike, name: str) -> str:
  """Where the video of a name lies: a folder of frames or a file, with or without its
  suffix, and with or without ActivityNet's "v_"; where it would lie, if it does not.
  Of an address such as "https://a.org/b/c.jpg" the end is the name.
  """
  place = pathlib.Path(folder)
  if "://" in name:
    name = name.rpartition("/")[2]
  for stem in (name, f"v_{name}"):
    for suffix in ("", *SUFFIXES):
      path = place / f"{stem}{suffix}"
      if path.exists():
        return str(path)
  return str(place / f"{name}")


def hash_benchmark_files(benchmark: Benchmark, config: ConfigDict) -> str:
  """Returns a hash of a benchmark's files, and of the files of TEXTS in its folders."""
  read = []
  for given in filter(None, (config[name] for name in benchmark.files)):
    for name in (given,) if isinstance(given, str) else given:
      path = pathlib.Path(name)
      inside = sorted(file for pattern in TEXTS for file in path.glob(pattern))
      read += inside if path.is_dir() else [path]
  digest = hashlib.sha256(b"".join(file.read_bytes() for file in read))
  return digest.hexdigest()[:16]


# What became of cases.


def rule_case(
  question: BenchmarkQuestion, values: dict[str, float] | None, right: str = ""
) -> ScoredCase:
  """Returns what became of a question that no judge is asked about; None of `values`:
  it was not answered.
  """
  fault = "unanswered" if values is None else ""
  return ScoredCase(
    question.id, format_video_name(question.video), values or {}, fault, right=right
  )


def ratio_case(
  question: BenchmarkQuestion,
  tallies: Mapping[str, tuple[float | int, float | int]] | None,
  right: str = "",
) -> ScoredCase:
  """Returns a case that adds (above, below) to ratios of sums.

  Its value is its own ratio, weighted by below: where below is 0, it weighs nothing.
  None of `tallies`: it was not answered.
  """
  if tallies is None:
    return rule_case(question, None, right)
  values = {name: above / (below or 1) for name, (above, below) in tallies.items()}
  weights = {name: float(below) for name, (_, below) in tallies.items()}
  return rule_case(question, values, right)._replace(weights=weights)


def average_scores(rows: Sequence[ScoredCase], how: Resampling) -> BenchmarkScores:
  """Returns the weighted mean of each measure, measures by kind last.

  Questions about one video are drawn together, whatever the groups of `how`.
  """
  names = dict.fromkeys(name for row in rows for name in row.values)
  values = {}
  for measure in sorted(names, key=lambda name: "." in name):
    having = [row for row in rows if measure in row.values]
    weights = np.array([row.weights.get(measure, 1.0) for row in having])
    if weights.sum():
      values[measure] = bootstrap.compute_ratio_interval(
        np.array([row.values[measure] for row in having]) * weights,
        weights,
        how._replace(groups=[row.video for row in having]),
      )._replace(n=int((weights > 0).sum()))
  faults = collections.Counter(row.fault for row in rows)
  counts = {"cases": len(rows), **{fault: faults[fault] for fault in FAULTS}}
  return BenchmarkScores(values, list(rows), counts)


def hash_prompts(prompts: Mapping[str, str]) -> str:
  """Names what a judge is told."""
  return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]
