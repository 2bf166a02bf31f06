"""Declares what a benchmark is, lists all benchmarks and scores their cases.

A module of this package that has a tuple `BENCHMARKS` declares benchmarks. The config,
the validation and the stage `eval` read the table from `load_benchmarks`. A case that
cannot be measured is counted by its reason, never as 0.
"""

import collections
import functools
import hashlib
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.data.formats.video_files import find_video
from vlmrlaif_jax.data.records import Example, SkippedRecord
from vlmrlaif_jax.data.video import Media, format_video_name
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Interval, Resampling
from vlmrlaif_jax.evals.text_similarity import STATEMENTS, Similarity

# Reasons for a missing score: the model gave no answer, the judge gave no reply, or the
# reply has no readable score.
FAULTS = ("unanswered", "unjudged", "unparsed")
TEXTS = (
  "*.json",
  "*.txt",
  "query/*.json",
  "*.jsonl",
  "*.csv",
  "*.parquet",
)  # Files of a benchmark's folder.


class BenchmarkQuestion(NamedTuple):
  """A question about a video."""

  id: str  # Unique in the benchmark; the cached answer is stored under it.
  video: Media
  text: str
  options: tuple[str, ...] = ()  # Options of a multiple choice.


class BenchmarkReply(NamedTuple):
  """A model's answer."""

  text: str
  stopped: bool = True  # True if the answer ended with EOS within its maximum length.


class BenchmarkModel(NamedTuple):
  """The functions of a policy that a benchmark calls."""

  # Returns a reply to each question. It is None if the video cannot be read or the
  # prompt is too long.
  generate_replies: Callable[
    [Sequence[BenchmarkQuestion]], Sequence[BenchmarkReply | None]
  ]
  # Returns the log-probability of each option in nats, or None as above. The arguments
  # are the name of the cache file and the questions. Needed for options only.
  choose: (
    Callable[[str, Sequence[BenchmarkQuestion]], list[list[float] | None]] | None
  ) = None
  similarity: Similarity = STATEMENTS  # Text similarity of retrieval and recognition.
  # Scores the answer to each held-out example by the section `reward`; an invalid score
  # is None. None if there is no reward.
  compute_rewards: (
    Callable[[Sequence[Example], Sequence[BenchmarkReply]], Sequence[float | None]]
    | None
  ) = None

  def answer(self, questions: Sequence[BenchmarkQuestion]) -> list[str | None]:
    """Returns the text of each reply, None for a missing reply."""
    return [reply and reply.text for reply in self.generate_replies(questions)]


class BenchmarkItem(NamedTuple):
  """A record of a benchmark's file: a question and its right answer."""

  question: BenchmarkQuestion
  answer: str
  kind: str = ""  # Kind of question; each measure is also averaged per kind.
  content: str = ""  # Content of the video, for the judge's prompt.
  rival: str = ""  # Reference answer that the judge compares with.


class JudgeCase(NamedTuple):
  """A model's answers for a judge to rate, with the right answer."""

  id: str
  video: Media
  prompt: str  # Complete prompt of the judge.
  answer: str  # The right answer.
  # One response, or one per question if several questions share a right answer.
  responses: tuple[str | None, ...]
  rival: str = ""  # Reference answer to compare with, "" for none.


class CaseJudge(NamedTuple):
  """A judge that rates answers."""

  name: str
  # Settings that the replies depend on. "version" is the model of a server, or the
  # fingerprint of local weights.
  facts: Mapping[str, Any]
  # Returns a reply to each case, None for a missing one. Every response of a case must
  # be present.
  ask: Callable[[Sequence[JudgeCase]], list[str | None]]


class ScoredCase(NamedTuple):
  """A case with its measured values, or with the reason for missing values."""

  id: str
  video: str  # Name of the video from `format_video_name`.
  values: dict[str, float]  # Value of each measure; empty if there is a fault.
  fault: str = ""  # One of FAULTS, or "".
  weights: Mapping[str, float] = {}  # Weight of each measure in the mean, by default 1.
  right: str = ""  # The right answer, "" if the benchmark has none.
  details: Mapping[str, Any] = {}  # Question, answer and other fields of reports.


class BenchmarkScores(NamedTuple):
  """The result of a benchmark."""

  values: dict[str, Interval]  # Mean of each measure over the cases that have it.
  rows: list[ScoredCase]
  counts: dict[str, int]  # Number of "cases" and of cases with each of FAULTS.


class Source(NamedTuple):
  """The origin of a benchmark's files and their layout."""

  name: str
  url: str
  layout: str

  def describe(self) -> str:
    """Returns the origin and the expected layout, for error messages."""
    return f"{self.name} comes from {self.url}; expected layout:\n{self.layout}"


class Benchmark(NamedTuple):
  """A benchmark, as a module of this package declares it."""

  name: str  # Name in `evaluate.names` and of its section of `evaluate` in a config.
  source: Source
  # Loads the items of the files that the settings name, and adds the skipped rows to
  # the list. Raises FileNotFoundError for a missing file and ValueError for another
  # layout. None means that the benchmark has no files: the items are the held-out
  # examples of the run's data.
  load: Callable[[ConfigDict, list[SkippedRecord]], Sequence[Any]] | None
  # Returns the scored cases, from the items, the policy, the judge and the settings.
  run: Callable[
    [Sequence[Any], BenchmarkModel, CaseJudge, ConfigDict], list[ScoredCase]
  ]
  settings: Mapping[str, Any] = {}  # Defaults of settings in addition to the paths.
  scoring: str = "judge"  # Scoring method: "judge", "rules" or "similarity".
  prompts: Mapping[str, str] = {}  # Prompts that the judge or the policy receives.
  files: tuple[str, ...] = ("questions",)  # Settings that name files to read.
  shares: tuple[str, ...] = ()  # Measures that tables show in per cent.
  # Writes the benchmark's files for the embedded world and returns the value of
  # `questions`. The arguments are the output folder, the examples and the folder of
  # their videos. None if the world cannot provide them.
  world: Callable[[pathlib.Path, Sequence[Example], str], pathlib.Path] | None = None
  # Raises ValueError if a setting has a wrong value.
  check: Callable[[ConfigDict], None] = lambda config: None
  # Compares the answers of two policies by a judge, if the setting `judge` is True. The
  # arguments are the items, the rows of both policies and the function that judges
  # pairs. Returns both lists of rows with the added measures.
  compare: Callable[..., tuple[list[ScoredCase], list[ScoredCase]]] | None = None

  def default_config(self) -> ConfigDict:
    """Returns the benchmark's section of a config, with empty paths."""
    files = {
      "questions": "",  # File or folder of the questions; "" for the embedded world.
      "videos": "",  # Folder of the videos.
    }
    return ConfigDict({**(files if self.load else {}), **self.settings})


@functools.cache
def load_benchmarks() -> dict[str, Benchmark]:
  """Returns every benchmark by its name."""
  package = importlib.import_module("vlmrlaif_jax.evals.benchmarks")
  submodules = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
  modules = [importlib.import_module(each.name) for each in submodules]
  declared = [vars(module).get("BENCHMARKS", ()) for module in modules]
  return {benchmark.name: benchmark for each in declared for benchmark in each}


# Files.


def make_question(
  config: ConfigDict, id: object, video: str, text: object
) -> BenchmarkQuestion:
  """Returns a question about a video of the folder `config.videos`."""
  return BenchmarkQuestion(str(id), find_video(config.videos, video), str(text))


def find_answers_file(questions: pathlib.Path) -> pathlib.Path | None:
  """Returns the file next to the questions that has their answers, None for none.

  It is test_a.json for test_q.json (ActivityNet-QA), and subset_answers.json for
  questions.json (EgoSchema).
  """
  names = {"questions.json": "subset_answers.json"}
  stem = questions.stem
  name = names.get(questions.name, f"{stem.removesuffix('_q')}_a{questions.suffix}")
  path = questions.with_name(name)
  is_named = stem.endswith("_q") or questions.name in names
  return path if is_named and path.is_file() else None


def hash_benchmark_files(benchmark: Benchmark, config: ConfigDict) -> str:
  """Returns a hash of a benchmark's files, with those of TEXTS in its folders."""
  files = []
  for paths in filter(None, (config[name] for name in benchmark.files)):
    for name in (paths,) if isinstance(paths, str) else paths:
      path = pathlib.Path(name)
      texts = sorted(file for pattern in TEXTS for file in path.glob(pattern))
      answers = find_answers_file(path)
      files += texts if path.is_dir() else [path, *([answers] if answers else [])]
  digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
  return digest.hexdigest()[:16]


# Scored cases.


def make_rule_case(
  question: BenchmarkQuestion, values: dict[str, float] | None, right: str = ""
) -> ScoredCase:
  """Returns the scored case of a question; `values` is None if it has no answer."""
  fault = "unanswered" if values is None else ""
  return ScoredCase(
    question.id, format_video_name(question.video), values or {}, fault, right=right
  )


def make_ratio_case(
  question: BenchmarkQuestion,
  tallies: Mapping[str, tuple[float | int, float | int]] | None,
  right: str = "",
) -> ScoredCase:
  """Returns a case whose measures are ratios of sums over all cases.

  Args:
    question: The question.
    tallies: (numerator, denominator) that the case adds to each measure, None if the
      question has no answer. A case with the denominator 0 has no weight.
    right: The right answer, "" for none.
  """
  if tallies is None:
    return make_rule_case(question, None, right)
  values = {
    name: numerator / (denominator or 1)
    for name, (numerator, denominator) in tallies.items()
  }
  weights = {name: float(denominator) for name, (_, denominator) in tallies.items()}
  return make_rule_case(question, values, right)._replace(weights=weights)


def average_scores(
  rows: Sequence[ScoredCase], resampling: Resampling
) -> BenchmarkScores:
  """Returns the weighted mean of each measure, measures per kind last.

  Cases of one video are resampled together, whatever the groups of `resampling` are.
  """
  names = dict.fromkeys(name for row in rows for name in row.values)
  values = {}
  for measure in sorted(names, key=lambda name: "." in name):
    measured = [row for row in rows if measure in row.values]
    weights = np.array([row.weights.get(measure, 1.0) for row in measured])
    if weights.sum():
      values[measure] = bootstrap.compute_ratio_interval(
        np.array([row.values[measure] for row in measured]) * weights,
        weights,
        resampling._replace(groups=[row.video for row in measured]),
      )._replace(n=int((weights > 0).sum()))
  faults = collections.Counter(row.fault for row in rows)
  counts = {"cases": len(rows), **{fault: faults[fault] for fault in FAULTS}}
  return BenchmarkScores(values, list(rows), counts)


def hash_prompts(prompts: Mapping[str, str]) -> str:
  """Returns a hash of prompts by name."""
  return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]
