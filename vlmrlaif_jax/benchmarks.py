"""PROGRAM: benchmarks of the papers, from their own files, for each policy.

What stands in WORKDIR/benchmarks/NAME/POLICY:
  answers.jsonl     each answer, before any is judged; a killed run goes on from these
  by_letter.jsonl   the log-probability of each option of a multiple choice; by_text
  judgements.jsonl  each reply of the judge, by all that it depends on
  rows.jsonl        each case with its values, or why it has none
  scores.json       the scores, and all that moves them: compare with launch/compare.py
"""

import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax import (
  answer,
  build,
  choose,
  evaluate,
  hosts,
  label,
  roles,
)
from vlmrlaif_jax import benchmarks_told as told_of
from vlmrlaif_jax.data import features
from vlmrlaif_jax.data.records import Problem
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.evals import (
  amber,
  benchmark,
  chair,
  common,
  mmhal,
  multiple_choice,
  videochatgpt,
  world_files,
  zero_shot_qa,
)
from vlmrlaif_jax.evals.benchmark import Case, Judge, Model, Question, Scores
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.judge import Query
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.types import Params

JUDGES = ("self", "endpoint", "exact")
FILES = ("questions", "videos", "synonyms", "annotations")  # Told by what is in them.

POOLING = "means over patches, means over frames"  # Of models.projector.pool.


class Entry(NamedTuple):
  """A benchmark by its module."""

  module: ModuleType
  world: str | None = None  # Of the world's files what it reads; None: it has none.
  judged: bool = True  # False: it goes by rules of its own.


BENCHMARKS = {
  "videochatgpt": Entry(videochatgpt, "."),
  "zero_shot_qa": Entry(zero_shot_qa, "zero_shot_qa.json"),
  "msvd_qa": Entry(zero_shot_qa),
  "msrvtt_qa": Entry(zero_shot_qa),
  "activitynet_qa": Entry(zero_shot_qa),
  "multiple_choice": Entry(multiple_choice, "multiple_choice.json", judged=False),
  "videomme": Entry(multiple_choice, judged=False),
  "chair": Entry(chair, "chair.json", judged=False),
  "amber": Entry(amber, "amber", judged=False),
  "mmhal": Entry(mmhal, "mmhal.json"),
}


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      names=(),  # Of BENCHMARKS.
      # "self": the SFT policy, shown the video; "endpoint"; "exact": word for word,
      # where the embedded world's truth is known.
      judge="self",
      judge_prompt_len=768,  # Tokens of what the SFT policy is asked, video included.
      judge_max_new=32,
      judge_sees=False,  # Whether an endpoint is shown frames; the papers' are not.
      prompt_len=0,  # Tokens of what a policy is asked, video included; 0: data's.
      batch=64,  # Questions, or cases to judge, at once.
      temperature=0.0,  # Of the answers.
      top_p=1.0,
      endpoint=endpoint.default_config(),
      # Files of each; "" where it can be made of the embedded world.
      **{name: entry.module.default_config() for name, entry in BENCHMARKS.items()},
    )
  )


def total_steps(run: build.Run) -> int:
  """Benchmarks."""
  return len(run.config.benchmarks.names)


def check(config: ConfigDict) -> None:
  """Refuses, before anything is computed, what could not be measured.

  Raises:
    ValueError: a setting, or a file's layout.
    FileNotFoundError: a file that the config names, with where it comes from.
  """
  section = config.benchmarks
  if section.judge not in JUDGES:
    raise ValueError(f"benchmarks.judge must be one of {JUDGES}, not {section.judge!r}")
  known = tuple(BENCHMARKS)
  if not section.names:
    raise ValueError(f"benchmarks.names is empty: give some of {known}")
  for name in section.names:
    if name not in BENCHMARKS:
      raise ValueError(f"benchmarks.names must be of {known}, not {name!r}")
    entry, files = BENCHMARKS[name], section[name]
    if not files.questions and entry.world is None:
      raise ValueError(
        f"benchmarks.{name}.questions is not given; {entry.module.SOURCE.told()}"
      )
    if entry.module is multiple_choice:
      multiple_choice.check(files)
    if files.questions:
      if section.judge == "exact" and entry.judged:
        raise ValueError(
          'benchmarks.judge="exact" reads word for word, which is just to the embedded '
          f"world alone, and not to benchmarks.{name}: set it self or endpoint"
        )
      if not files.videos or not pathlib.Path(files.videos).is_dir():
        raise FileNotFoundError(
          f"no folder at benchmarks.{name}.videos={files.videos!r}; "
          + entry.module.SOURCE.told()
        )
      entry.module.load(files)


def run_stage(
  run: build.Run, stage: str, folder: pathlib.Path, log: Log
) -> dict[str, Any]:
  """Runs each benchmark with each policy.

  Returns:
    The means by "NAME.POLICY.MEASURE".
  """
  check(run.config)
  _write_world(run)
  policies = roles.policies(run)
  shown = Shown(run, log)
  judge = judge_of(shown, policies["sft"], folder)
  summary = {}
  for number, name in enumerate(run.config.benchmarks.names):
    shown.done = number
    found = measure(shown, name, policies, judge, folder)
    log.table(f"{name}: mean [95 % interval]", told_of.table(found))
    log.progress(number + 1, {})
    summary |= {
      f"{name}.{policy}.{measure}": value.mean
      for policy, scores in found.items()
      for measure, value in scores.values.items()
    }
  return summary


def measure(
  shown: "Shown",
  name: str,
  policies: dict[str, Params],
  judge: Judge,
  folder: pathlib.Path,
) -> dict[str, Scores]:
  """What a benchmark finds of each policy, which is written as well."""
  run, found = shown.run, {}
  files = files_of(run, name)
  batch = answer.BATCHES * run.config.benchmarks.batch
  for policy, variables in policies.items():
    shown.log.note(f"benchmarks: {name} with {policy}")
    at = folder / name / policy
    asked = Policy(shown, variables, at)
    kept = benchmark.kept(judge, at / "judgements.jsonl", batch)
    model = Model(asked.answer, asked.choose)
    scores = BENCHMARKS[name].module.run(model, kept, files)
    shown.log.note(told_of.said_of(scores, asked.problems))
    told = told_of.result(scores, recipe_of(run, name, files, judge), asked.problems)
    told = {"policy": policy, "weights": common.fingerprint(variables), **told}
    hosts.once(lambda at=at, told=told, rows=scores.rows: told_of.write(at, told, rows))
    found[policy] = scores
  return found


def files_of(run: build.Run, name: str) -> ConfigDict:
  """The files of a benchmark; where none are given, those of the world."""
  given, world = run.config.benchmarks[name], BENCHMARKS[name].world
  if given.questions:
    return given
  videos = build.videos_folder(run.config, run.workdir)
  made = given.copy_and_resolve_references()
  made.update(questions=str(_world(run) / world), videos=str(videos))
  return made


def _world(run: build.Run) -> pathlib.Path:
  return run.workdir / "benchmarks" / "world"


def _write_world(run: build.Run) -> None:
  """Writes the files of the world, for all benchmarks that none are given for."""
  section = run.config.benchmarks
  if not all(section[name].questions for name in section.names):
    videos = build.videos_folder(run.config, run.workdir)
    given = run.splits.benchmark
    hosts.once(lambda: world_files.write(_world(run), given, videos))


# Who answers, and who judges.


class Shown:
  """A run, and the features of the videos that it was asked about so far."""

  def __init__(self, run: build.Run, log: Log):
    config = run.config.copy_and_resolve_references()
    config.data.prompt_len = config.benchmarks.prompt_len or config.data.prompt_len
    self.run, self.log = run._replace(config=config), log
    self.done = 0  # Benchmarks.

  def encode(self, videos: Sequence[VideoPath]) -> None:
    """Adds what is not there yet; those that cannot be read are among the failures."""
    store = self.run.features
    todo = [
      video
      for video in videos
      if not store.has(video) and features.name_of(video) not in store.failures
    ]
    if todo:
      made = build.encode_videos(self.run, todo, self.log.note)
      store = store._replace(
        files=store.files | made.files, failures=store.failures | made.failures
      )
      self.run = self.run._replace(features=store)


class Policy:
  """A policy that answers, into files of a folder; what it cannot are its problems."""

  def __init__(self, shown: Shown, variables: Params, folder: pathlib.Path):
    self.shown, self.variables, self.folder = shown, variables, folder
    self.problems: list[Problem] = []

  def answer(self, name: str, questions: Sequence[Question]) -> list[str | None]:
    """See benchmark.Model."""
    seen = self._seen(questions)
    run, path = self.shown.run, self.folder / f"{name}.jsonl"
    asked = [answer.Request(q.id, q.video, q.text) for q in seen]
    made = evaluate.kept_answers(
      run, self.variables, asked, sampling_of(run.config), path, self._tell
    )
    texts = [reply.text if reply.fits else None for reply in made]
    return self._for_each(questions, seen, texts, "benchmarks.prompt_len")

  def choose(self, name: str, questions: Sequence[Question]) -> list:
    """See benchmark.Model."""
    seen = self._seen(questions)
    run, path = self.shown.run, self.folder / f"{name}.jsonl"
    size = run.config.benchmarks.batch
    made = choose.kept(run, self.variables, seen, path, batch=size, tell=self._tell)
    limit = "benchmarks.prompt_len, or an option longer than data.response_len"
    return self._for_each(questions, seen, made, limit)

  def _seen(self, questions: Sequence[Question]) -> list[Question]:
    """Those whose videos can be read."""
    self.shown.encode([q.video for q in questions])
    store = self.shown.run.features
    lost = [q for q in questions if not store.has(q.video)]
    reason = lambda q: store.failures[features.name_of(q.video)]
    self.problems += [Problem(q.id, reason(q)) for q in lost]
    return [q for q in questions if store.has(q.video)]

  def _for_each(self, questions, seen, made, limit: str) -> list:
    """What was made of each question; None of those longer than a setting allows."""
    found = {q.id: each for q, each in zip(seen, made, strict=True) if each is not None}
    long = [q.id for q in seen if q.id not in found]
    self.problems += [Problem(id, f"longer than {limit}: raise it") for id in long]
    return [found.get(q.id) for q in questions]

  def _tell(self, done: int) -> None:
    self.shown.log.progress(self.shown.done, {}, f"{done} answers")


def sampling_of(config: ConfigDict) -> answer.Sampling:
  section = config.benchmarks
  return answer.Sampling(
    config.data.prompt_len,
    config.data.response_len,
    section.batch,
    section.temperature,
    section.top_p,
  )


def judge_of(shown: Shown, variables: Params, folder: pathlib.Path) -> Judge:
  """The judge that the config names.

  Args:
    variables: of the SFT policy.
  """
  config = shown.run.config.benchmarks
  if config.judge == "exact":
    return world_files.EXACT
  if config.judge == "endpoint":
    server = endpoint.Endpoint(config.endpoint, folder / "endpoint.sqlite")
    return Judge("endpoint", _of_server(config), _by_server(shown, server.ask))
  sampling = answer.Sampling(
    config.judge_prompt_len, config.judge_max_new, config.batch
  )

  def ask(cases: Sequence[Case]) -> list[str | None]:
    shown.run.watch.check("what was answered and judged is kept")
    shown.encode([case.video for case in cases])
    queries = [Query(f"rate:{c.id}", c.video, c.prompt) for c in cases]
    return label.asking(shown.run, variables, sampling)(queries)

  version = common.fingerprint(variables, sampling)
  template = shown.run.config.model.template
  return Judge("self", {"version": version, "template": template}, ask)


def _of_server(config: ConfigDict) -> dict[str, Any]:
  server = config.endpoint
  seen = ("frames", "side") if config.judge_sees else ()
  sent = ("max_tokens", "temperature", *seen)
  return {"version": server.model, **{key: server[key] for key in sent}}


def _by_server(shown: Shown, ask):
  sees = shown.run.config.benchmarks.judge_sees

  def asking(cases: Sequence[Case]) -> list[str | None]:
    shown.run.watch.check("what was answered and judged is kept")
    return ask([Query(c.id, c.video if sees else (), c.prompt) for c in cases])

  return asking


# What is written.


def recipe_of(
  run: build.Run, name: str, files: ConfigDict, judge: Judge
) -> dict[str, Any]:
  """All that a score depends on beside the policy's weights: video scores move by
  several points with each of these."""
  config = run.config
  sampling = sampling_of(config)._asdict() | {"seed": config.seed}
  del sampling["batch"]  # No answer depends on it.
  return {
    "benchmark": name,
    "questions": benchmark.content(files),
    "frames": config.model.frames,
    "resolution": run.policy.vision.image,
    "pooling": POOLING,
    "template": config.model.template,
    "sampling": sampling,
    "prompts": benchmark.prompt_hash(BENCHMARKS[name].module.PROMPTS),
    "judge": {"name": judge.name, **judge.facts}
    if BENCHMARKS[name].judged
    else {"name": "rules"},
    "settings": {k: v for k, v in files.items() if k not in FILES},
  }
