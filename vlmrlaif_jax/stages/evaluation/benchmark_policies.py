"""Who answers the stage `benchmarks`, who judges, and what compares texts."""

import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features, tokenization
from vlmrlaif_jax.data.records import Problem
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.evals import clip_similarity, text_similarity
from vlmrlaif_jax.evals.benchmarks import world_files
from vlmrlaif_jax.evals.benchmarks.protocol import Case, Judge, Question
from vlmrlaif_jax.evals.text_similarity import Likeness
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.pairwise_judge import Query
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import with_features
from vlmrlaif_jax.stages.evaluation import option_logps

PROMPT = 32  # Tokens that lengths of prompts are multiples of: few compilations.


class Shown:
  """A run, and the features of the videos that it was asked about so far."""

  def __init__(self, run: Run, log: Log):
    config = run.config.copy_and_resolve_references()
    config.data.prompt_len = config.benchmarks.prompt_len or config.data.prompt_len
    self.run, self.log = run._replace(config=config), log
    self.done = 0  # Benchmarks.

  def encode(self, videos: Sequence[VideoPath]) -> None:
    """Adds what is not there yet; those that cannot be read are among the failures."""
    self.run = with_features(self.run, videos, self.log.note)


class Policy:
  """A policy that answers, into files of a folder; what it cannot are its problems."""

  def __init__(self, shown: Shown, variables: Params, folder: pathlib.Path):
    self.shown, self.variables, self.folder = shown, variables, folder
    self.problems: list[Problem] = []

  def answer(self, name: str, questions: Sequence[Question]) -> list[str | None]:
    """See benchmark.Model."""
    seen = self._seen(questions)
    run, path = self._run(seen), self.folder / f"{name}.jsonl"
    asked = [answering.Request(q.id, q.video, q.text) for q in seen]
    sampling = answering.sampling_of(run.config, "benchmarks")
    answerer = answering.Answerer(run, self.variables, sampling, path)
    texts = answerer.texts(asked, self._tell)
    return self._for_each(questions, seen, texts, "benchmarks.prompt_len")

  def choose(self, name: str, questions: Sequence[Question]) -> list:
    """See benchmark.Model."""
    seen = self._seen(questions)
    run, path = self._run(seen), self.folder / f"{name}.jsonl"
    size = run.config.benchmarks.batch
    made = option_logps.kept(
      run, self.variables, seen, path, batch=size, tell=self._tell
    )
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

  def _run(self, questions: Sequence[Question]) -> Run:
    """The run, whose prompts are as long as these need: padding takes time as well."""
    run, config = self.shown.run, self.shown.run.config.copy_and_resolve_references()
    count = run.policy.video_tokens(config.model.frames)
    texts = {q.text for q in questions}
    prompts = (
      answering.prompt_ids(run, [(t, None)], video_tokens=count) for t in texts
    )
    longest = max((len(prompt.ids) for prompt in prompts), default=1)
    longest = tokenization.bucket(longest, multiple=PROMPT)
    config.data.prompt_len = min(config.data.prompt_len, longest)
    return run._replace(config=config)

  def _for_each(self, questions, seen, made, limit: str) -> list:
    """What was made of each question; None of those longer than a setting allows."""
    found = {q.id: each for q, each in zip(seen, made, strict=True) if each is not None}
    long = [q.id for q in seen if q.id not in found]
    self.problems += [Problem(id, f"longer than {limit}: raise it") for id in long]
    return [found.get(q.id) for q in questions]

  def _tell(self, done: int) -> None:
    self.shown.log.progress(self.shown.done, {}, f"{done} answers")


def likeness_of(config: ConfigDict) -> Likeness:
  """What compares texts, as the config names it."""
  if config.likeness == "statements":
    return text_similarity.STATEMENTS
  return clip_similarity.by_clip(config.clip, cut=config.clip_cut)


def judge_of(shown: Shown, variables: Params, folder: pathlib.Path) -> Judge:
  """The judge that the config names.

  Args:
    variables: of the SFT policy.
  """
  config = shown.run.config.benchmarks
  if config.judge == "exact":
    return world_files.EXACT
  if config.judge == "endpoint":
    server = endpoint.Endpoint(config.endpoint, folder / "endpoint.jsonl")
    return Judge("endpoint", _of_server(config), _by_server(shown, server.ask))
  sampling = answering.Sampling(
    config.judge_prompt_len, config.judge_max_new, config.batch
  )

  def ask(cases: Sequence[Case]) -> list[str | None]:
    shown.run.watch.check("what was answered and judged is kept")
    shown.encode([case.video for case in cases])
    queries = [Query(f"rate:{c.id}", c.video, c.prompt) for c in cases]
    return answering.Answerer(shown.run, variables, sampling).ask(queries)

  version = resumable.fingerprint(variables, sampling.facts())
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
