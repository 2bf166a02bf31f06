"""Policies and judges that the stage `eval` measures and uses."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example, SkippedRecord
from vlmrlaif_jax.data.video import Media
from vlmrlaif_jax.evals.benchmarks import world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  BenchmarkReply,
  CaseJudge,
  JudgeCase,
)
from vlmrlaif_jax.evals.text_similarity import Similarity
from vlmrlaif_jax.feedback import endpoint, pairwise_judge
from vlmrlaif_jax.feedback.pairwise_judge import (
  AnswerPair,
  AskFn,
  JudgeQuery,
  PairOutcome,
)
from vlmrlaif_jax.runtime import answering, video
from vlmrlaif_jax.runtime.rewarding import TextScorer
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.evaluation import best_of_n, option_logps

# Prompt lengths are multiples of this number of tokens, to limit compilations.
PROMPT_MULTIPLE = 32


class EncodedRun:
  """A run with the features of the videos that its benchmarks use so far.

  Attributes:
    run: The run, with the prompt length of the evaluation.
    log: Log of the stage.
    reward: Scores answers by the section `reward`; None for no scores.
    done: Number of finished benchmarks.
  """

  def __init__(self, run: Run, log: StageLog, reward: TextScorer | None = None):
    config = run.config.copy_and_resolve_references()
    config.data.prompt_len = config.evaluate.prompt_len or config.data.prompt_len
    self.run, self.log, self.reward = run._replace(config=config), log, reward
    self.done = 0

  def encode(self, videos: Sequence[Media]) -> None:
    """Encodes videos without features. Unreadable videos are added to the failures."""
    self.run = video.encode_videos(self.run, videos, self.log.print_note)


class BestOf(NamedTuple):
  """The selection among several answers to a question; see best_of_n.py."""

  reference: Params  # Variables at the start of DPO.
  file: pathlib.Path  # Cache of the answers and their rewards.
  answers: int  # Number of answers to choose from.
  by: str  # Reward: "mean", "total" or "reward".


class Policy:
  """A policy that answers questions and caches its answers in a folder.

  Attributes:
    encoded: The run.
    variables: Variables of run.policy.
    folder: Folder of the policy in a benchmark.
    best_of: Selection among several answers; None for one answer per question.
    problems: Questions without an answer.
  """

  def __init__(
    self,
    encoded: EncodedRun,
    variables: Params,
    folder: pathlib.Path,
    best_of: BestOf | None = None,
  ):
    self.encoded, self.variables, self.folder = encoded, variables, folder
    self.best_of = best_of
    self.problems: list[SkippedRecord] = []

  def make_model(self, similarity: Similarity) -> BenchmarkModel:
    """Returns the interface of the policy for benchmarks."""
    reward = self.compute_rewards if self.encoded.reward else None
    return BenchmarkModel(
      self.generate_replies, self.compute_option_logps, similarity, reward
    )

  def generate_replies(
    self, questions: Sequence[BenchmarkQuestion]
  ) -> list[BenchmarkReply | None]:
    """Returns a reply to each question; see BenchmarkModel."""
    readable = self._select_readable(questions)
    run, sampling = self._get_sampling(readable)
    queries = [JudgeQuery(q.id, q.video, q.text) for q in readable]
    if self.best_of is None:
      path = self.folder / "answers.jsonl"
      answerer = answering.Answerer(run, self.variables, sampling, path)
      samples = answerer.generate_replies(queries, self._log_progress)
      outputs = [first for first, *_ in samples]
    else:
      outputs = self._select_best(run, queries, sampling)
    replies = [
      BenchmarkReply(text, stopped) if fits else None for text, stopped, fits in outputs
    ]
    return self._align_outputs(questions, readable, replies)

  def compute_option_logps(
    self, name: str, questions: Sequence[BenchmarkQuestion]
  ) -> list:
    """Returns the log-probabilities of each question's options; see BenchmarkModel."""
    readable = self._select_readable(questions)
    run, sampling = self._get_sampling(readable)
    path = self.folder / f"{name}.jsonl"
    batch, on_done = sampling.batch, self._log_progress
    outputs = option_logps.load_or_compute_option_logps(
      run, self.variables, readable, path, batch=batch, on_done=on_done
    )
    return self._align_outputs(
      questions, readable, outputs, ", or an option longer than data.response_len"
    )

  def compute_rewards(
    self, examples: Sequence[Example], replies: Sequence[BenchmarkReply]
  ) -> list[float | None]:
    """Returns the score of each answer, None if invalid; see BenchmarkModel."""
    assert self.encoded.reward
    questions = [
      BenchmarkQuestion(e["id"], e["video"], e["question"]) for e in examples
    ]
    run, _ = self._get_sampling(questions)
    texts, stopped = [r.text for r in replies], [r.stopped for r in replies]
    result = self.encoded.reward(run, examples, texts, stopped)
    if texts and not result.valid.any():
      reasons = "; ".join(
        f"{term}: {why.rstrip().splitlines()[-1]}"
        for term, why in result.failures.items()
      )
      self.encoded.log.print_note(f"eval: no answer has a reward: {reasons}")
    pairs = zip(result.scores.tolist(), result.valid, strict=True)
    return [score if valid else None for score, valid in pairs]

  def _select_best(self, run, queries, sampling) -> list[answering.VideoReply]:
    assert self.best_of
    reference, file, count, by = self.best_of
    config = run.config.evaluate.held_out
    candidates = best_of_n.load_or_sample_candidates(
      run,
      self.variables,
      reference,
      queries,
      sampling._replace(
        temperature=config.bon_temperature,
        top_p=config.bon_top_p,
        samples=max(config.best_of),
      ),
      file,
    )
    if by == "reward":
      candidates = self._add_rewards(candidates)
    return best_of_n.choose_best(candidates, by, count)

  def _add_rewards(self, candidates: Sequence[JsonRow]) -> list[JsonRow]:
    """Adds scores by the section `reward`; an answer without one is the worst."""
    examples = {f"best:{e['id']}": e for e in self.encoded.run.splits.benchmark}
    flat = [(examples[row["id"]], r) for row in candidates for r in row["replies"]]
    replies = [BenchmarkReply(*reply[:2]) for _, reply in flat]
    rewards = self.compute_rewards([example for example, _ in flat], replies)
    lowest = min((score for score in rewards if score is not None), default=0.0)
    scores = np.array([lowest - 1 if x is None else x for x in rewards])
    rows = scores.reshape(len(candidates), -1).tolist()
    return [row | {"reward": each} for row, each in zip(candidates, rows, strict=True)]

  def _select_readable(
    self, questions: Sequence[BenchmarkQuestion]
  ) -> list[BenchmarkQuestion]:
    """Returns the questions whose videos can be read."""
    self.encoded.encode([q.video for q in questions])
    store = self.encoded.run.features
    unreadable = [q for q in questions if not store.has(q.video)]
    reasons = [store.get_failure(q.video) for q in unreadable]
    self.problems += [
      SkippedRecord(q.id, reason) for q, reason in zip(unreadable, reasons, strict=True)
    ]
    return [q for q in questions if store.has(q.video)]

  def _get_sampling(
    self, questions: Sequence[BenchmarkQuestion]
  ) -> tuple[Run, answering.SamplingSettings]:
    """Returns the run and its sampling settings, with the minimum prompt length."""
    run = self.encoded.run
    config = run.config.copy_and_resolve_references()
    prompts = (
      answering.encode_prompt(run, [(q.text, None)], run.lay_out_video(q.video))
      for q in questions
    )
    max_len = max((len(prompt.ids) for prompt in prompts), default=1)
    max_len = tokenization.round_up_length(max_len, multiple=PROMPT_MULTIPLE)
    config.data.prompt_len = min(config.data.prompt_len, max_len)
    return run._replace(config=config), answering.read_sampling_settings(
      config, "evaluate"
    )

  def _align_outputs(self, questions, readable, outputs, also: str = "") -> list:
    """Returns the output of each question, None for one that is too long."""
    limit = f"evaluate.prompt_len={self.encoded.run.config.data.prompt_len}{also}"
    outputs_by_id = {
      q.id: each for q, each in zip(readable, outputs, strict=True) if each is not None
    }
    too_long = [q.id for q in readable if q.id not in outputs_by_id]
    self.problems += [
      SkippedRecord(id, f"longer than {limit}: raise this setting") for id in too_long
    ]
    return [outputs_by_id.get(q.id) for q in questions]

  def _log_progress(self, done: int) -> None:
    self.encoded.log.log_progress(self.encoded.done, {}, f"{done} answers")


def make_benchmark_policies(
  encoded: EncodedRun,
  policies: Mapping[str, Params],
  folder: pathlib.Path,
  counts: Sequence,
) -> dict[str, Policy]:
  """Returns each policy, and a best-of-n policy of the last one for each n.

  Args:
    encoded: The run.
    policies: Variables by name.
    folder: Folder of a benchmark.
    counts: Values of n.

  Raises:
    UserError: `counts` is not empty, but no stage has trained a policy after SFT.
  """
  answering_policies = {
    name: Policy(encoded, variables, folder / name)
    for name, variables in policies.items()
  }
  if not counts:
    return answering_policies
  if "reward" in encoded.run.config.evaluate.held_out.bon_reward and not encoded.reward:
    raise UserError(
      "evaluate.held_out.bon_reward='reward' needs the section reward or a trained "
      "reward model: add config.reward, or set bon_reward=('mean',)"
    )
  *_, last = policies
  if last == "sft":
    raise UserError(
      "evaluate.held_out.best_of needs a policy that RL or DPO has trained: set "
      "--config.evaluate.held_out.best_of=(), or run such a stage"
    )
  file = folder / f"best_of_{last}.jsonl"
  for count in counts:
    for by in encoded.run.config.evaluate.held_out.bon_reward:
      name = f"{last}@{count}" + ("" if by == "mean" else f":{by}")
      best_of = BestOf(policies["sft"], file, count, by)
      answering_policies[name] = Policy(encoded, policies[last], folder / name, best_of)
  return answering_policies


def make_judge(
  encoded: EncodedRun, variables: Params, folder: pathlib.Path
) -> CaseJudge:
  """Returns the judge that the config selects.

  `variables` are those of the SFT policy, and `folder` is that of the stage.
  """
  config = encoded.run.config.evaluate
  if config.judge == "exact":
    return world_files.EXACT
  if config.judge == "endpoint":
    server, sees_video = config.endpoint, config.judge_sees_video
    sent = ("max_tokens", "temperature", *(("frames", "side") if sees_video else ()))
    facts = {"version": server.model, **{key: server[key] for key in sent}}
    ask: AskFn = endpoint.Endpoint(server, folder / "endpoint.jsonl").ask
    ask = ask if sees_video else pairwise_judge.hide_videos(ask)
  else:
    sampling = answering.SamplingSettings(
      config.judge_prompt_len, config.judge_max_new, config.batch
    )
    facts = {
      "version": resumable.compute_fingerprint(variables, sampling.cache_key()),
      "template": encoded.run.config.model.template,
    }

    def ask(queries):
      encoded.encode([query.video for query in queries])
      return answering.Answerer(encoded.run, variables, sampling).ask_judge(queries)

  def judge_cases(cases: Sequence[JudgeCase]) -> list[str | None]:
    encoded.run.watch.check("eval: answers and judgements so far are saved")
    return [*ask([JudgeQuery(f"rate:{c.id}", c.video, c.prompt) for c in cases])]

  return CaseJudge(config.judge, facts, judge_cases)


def make_pair_judge(
  encoded: EncodedRun, variables: Params, path: pathlib.Path
) -> Callable[[list[AnswerPair]], list[PairOutcome]]:
  """Returns a policy as the judge of pairs, with the prompts of the stage `label`.

  The file `path` caches its verdicts.
  """
  run, label = encoded.run, encoded.run.config.label
  sampling = answering.SamplingSettings(
    label.judge_prompt_len, label.judge_max_new, run.config.evaluate.batch
  )
  ask = answering.Answerer(run, variables, sampling, path).ask_judge
  return lambda pairs: pairwise_judge.judge_pairs(pairs, ask, run.prompts)
