"""The declaration of a benchmark, the table of all, and functions that they share.

A module of this package that has a tuple `BENCHMARKS` declares benchmarks. The config,
the validation and the stage `benchmarks` read the table. A case that cannot be measured
is counted by its reason, never as 0.
"""

import collections
import functools
import hashlib
import importlib
import json
import os
import pathlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, jsonl
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Interval
from vlmrlaif_jax.evals.text_similarity import Likeness

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
# Why there is no number: the model gave no answer, or the judge no reply, or none that
# can be read.
FAULTS = ("unanswered", "unjudged", "unparsed")
TEXTS = ("*.json", "*.txt", "query/*.json")  # What a benchmark's folder may hold.


class Question(NamedTuple):
  """What a model is asked about a video."""

  id: str  # Of its own in the benchmark; with it the file that keeps the answer.
  video: str
  text: str
  options: tuple[str, ...] = ()  # Of a multiple choice.


class Model(NamedTuple):
  """What a benchmark may ask of a policy."""

  # (name of the file that keeps them, questions) -> an answer to each; None where there
  # is none, for the video cannot be read or the prompt is too long.
  answer: Callable[[str, Sequence[Question]], list[str | None]]
  # (as above) -> the log-probability of each option, in nats. Of no use, and None, to
  # benchmarks without options.
  choose: Callable[[str, Sequence[Question]], list[list[float] | None]] | None = None
  # What compares texts; likewise None to benchmarks that compare none.
  alike: Likeness | None = None


class Case(NamedTuple):
  """What a judge is to rate: answers of a model, held against the right one."""

  id: str
  video: str
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
  video: str
  values: dict[str, float]  # By measure; empty where there is a fault.
  fault: str = ""  # Of FAULTS.
  # By measure: what the case weighs in the mean, where that is not 1.
  weights: Mapping[str, float] = {}
  right: str = ""  # The right answer, where there is one.


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


class Benchmark(NamedTuple):
  """A benchmark of a paper, as modules of this package declare it."""

  name: str  # In `benchmarks.names`; also its section of `benchmarks` in a config.
  source: Source
  # Reads the files that the settings name. Raises FileNotFoundError or ValueError if
  # they are missing or not of the source's layout.
  load: Callable[[ConfigDict], Any]
  run: Callable[[Model, Judge, ConfigDict], Scores]
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

  def default_config(self) -> ConfigDict:
    """Returns its section of a config, with the paths of its files empty."""
    return ConfigDict({"questions": "", "videos": "", **self.settings})


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


# Judging.


def judged(
  cases: Sequence[Case],
  judge: Judge,
  parse: Callable[[str], Mapping[str, float] | None],
) -> list[Scored]:
  """What becomes of each case; one without an answer is not judged.

  Args:
    parse: the values that a reply names; None if it cannot be told.
  """
  asked = [case for case in cases if None not in case.said]
  replies = dict(zip((c.id for c in asked), judge.ask(asked), strict=True))

  def outcome(case: Case) -> Scored:
    found = Scored(case.id, case.video, {}, right=case.answer)
    if case.id not in replies:
      return found._replace(fault="unanswered")
    reply = replies[case.id]
    if reply is None:
      return found._replace(fault="unjudged")
    values = parse(reply)
    return found._replace(values=dict(values or {}), fault="" if values else "unparsed")

  return [outcome(case) for case in cases]


def tallied(
  id: str, video: str, tallies: Mapping[str, tuple[int, int]], fault: str = ""
) -> Scored:
  """A case that adds (above, below) to ratios of sums: its own ratio, weighed by below.

  Where below is 0, the case weighs nothing.
  """
  values = {name: above / (below or 1) for name, (above, below) in tallies.items()}
  weights = {name: float(below) for name, (_, below) in tallies.items()}
  return Scored(id, video, values, fault, weights)


def told(question: Question, values: dict[str, float] | None, right: str) -> Scored:
  """What became of a question that no judge is asked about.

  Args:
    values: None if it was not answered.
    right: the right answer.
  """
  about = question.id, question.video
  if values is None:
    return Scored(*about, {}, "unanswered")
  return Scored(*about, values, right=right)


def by_kind(rows: Sequence[Scored], kinds: Sequence[str]) -> list[Scored]:
  """The rows with each of their values once more, as "KIND.MEASURE"."""
  return [
    row._replace(values={**row.values, **_named(kind, row.values)})
    for row, kind in zip(rows, kinds, strict=True)
  ]


def _named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
  return {f"{kind}.{name}": value for name, value in values.items()}


def scores_of(rows: Sequence[Scored]) -> Scores:
  """The weighed mean of each measure that a case has weight in; questions about one
  video are drawn together.
  """
  values = {}
  for measure in dict.fromkeys(name for row in rows for name in row.values):
    having = [row for row in rows if measure in row.values]
    weights = np.array([row.weights.get(measure, 1.0) for row in having])
    if weights.sum():
      values[measure] = bootstrap.ratio_interval(
        np.array([row.values[measure] for row in having]) * weights,
        weights,
        bootstrap.Resampling([row.video for row in having]),
      )._replace(n=int((weights > 0).sum()))
  faults = collections.Counter(row.fault for row in rows)
  counts = {"cases": len(rows), **{fault: faults[fault] for fault in FAULTS}}
  return Scores(values, list(rows), counts)


def kept(judge: Judge, path: pathlib.Path, batch: int) -> Judge:
  """A judge who is not asked again what stands in a file; no reply is asked for again.

  Args:
    batch: cases whose replies reach the file together.
  """

  def ask(cases: Sequence[Case]) -> list[str | None]:
    keys = [_key(judge, case) for case in cases]
    rows = distributed.once(lambda: jsonl.read_jsonl(path) if path.exists() else [])
    known = {row["key"]: row["reply"] for row in rows}
    wanted = {k: c for k, c in zip(keys, cases, strict=True) if k not in known}
    todo = list(wanted.items())
    for start in range(0, len(todo), batch):
      part = todo[start : start + batch]
      replies = judge.ask([case for _, case in part])
      made = [
        {"key": key, "id": case.id, "reply": reply}
        for (key, case), reply in zip(part, replies, strict=True)
        if reply is not None
      ]
      distributed.once(functools.partial(jsonl.append_jsonl, path, made))
      known |= {row["key"]: row["reply"] for row in made}
    return [known.get(key) for key in keys]

  return judge._replace(ask=ask)


def _key(judge: Judge, case: Case) -> str:
  """Names all that a reply depends on, but for where the videos lie."""
  facts = (judge.name, sorted(judge.facts.items()), case._replace(video=""))
  return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def prompt_hash(prompts: Mapping[str, str]) -> str:
  """Names what a judge is told."""
  return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]


# What judges say: '{"score": 4}', "{'pred': 'yes', 'score': 4.8}", "score: 4/5", "4".

_SCORE = re.compile(
  r"""(?<![a-z_])score["']?\s*[:=]\s*["']?([^\s"',}\]]+(\s*/\s*\d+)?)"""
)
_PRED = re.compile(r"""(?<![a-z_])pred["']?\s*[:=]\s*["']?(yes|no)\b""")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/\s*5)?")


def parse_score(text: str) -> float | None:
  """The one score from 0 to 5 that a reply names; None for none, others, or several."""
  plain = text.lower().replace("*", "").strip()
  found = {match[1].rstrip(".") for match in _SCORE.finditer(plain)}
  said = found or {plain.rstrip(".")}  # A bare number is a score, too.
  numbers = {match and float(match[1]) for match in map(_NUMBER.fullmatch, said)}
  if len(numbers) != 1:
    return None
  [score] = numbers
  return score if score is not None and score <= 5 else None


def parse_pred(text: str) -> bool | None:
  """Whether a reply says that an answer is right; None for neither or both."""
  found = set(_PRED.findall(text.lower()))
  return "yes" in found if len(found) == 1 else None
