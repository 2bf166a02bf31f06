"""Who answers the stage `eval`, who judges, and what compares texts."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features, tokenization
from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.data.video import VideoPath
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
from vlmrlaif_jax.feedback.pairwise_judge import AnswerPair, JudgeQuery, PairOutcome
from vlmrlaif_jax.runtime import answering, role_params, video
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.evaluation import best_of_n, option_logps

PROMPT_MULTIPLE = (
  32  # Tokens that lengths of prompts are multiples of: few compilations.
)
# The reward model's score of a text as the answer to each example.
RewardFn: TypeAlias = Callable[
  [Run, Sequence[Mapping[str, Any]], Sequence[str]], Iterable[float]
]


class EncodedRun:
  """A run, and the features of the videos that it was asked about so far."""

  def __init__(self, run: Run, log: StageLog, reward: RewardFn | None = None):
    config = run.config.copy_and_resolve_references()
    config.data.prompt_len = config.evaluate.prompt_len or config.data.prompt_len
    self.run, self.log, self.reward = run._replace(config=config), log, reward
    self.done = 0  # Benchmarks.

  def encode(self, videos: Sequence[VideoPath]) -> None:
    """Adds what is not there yet; those that cannot be read are among the failures."""
    self.run = video.encode_videos(self.run, videos, self.log.print_note)


class BestOf(NamedTuple):
  """How one of several answers to a question is chosen; see best_of_n.py."""

  reference: Params  # What DPO began with.
  file: pathlib.Path  # Saves the answers and their rewards.
  answers: int  # How many there are to choose from.
  by: str  # "mean" or "total".


class Policy:
  """A policy that answers, into files of a folder; what it cannot are its problems."""

  def __init__(
    self,
    shown: EncodedRun,
    variables: Params,
    folder: pathlib.Path,
    best_of: BestOf | None = None,
  ):
    self.shown, self.variables, self.folder = shown, variables, folder
    self.best_of = best_of
    self.problems: list[SkippedRecord] = []

  def model(self, alike: Similarity) -> BenchmarkModel:
    """Returns what a benchmark may ask of the policy."""
    reward = self.reward if self.shown.reward else None
    return BenchmarkModel(self.replies, self.choose, alike, reward)

  def replies(
    self, questions: Sequence[BenchmarkQuestion]
  ) -> list[BenchmarkReply | None]:
    """See protocol.Model."""
    seen = self._seen(questions)
    run, sampling = self._sampling(seen)
    queries = [JudgeQuery(q.id, q.video, q.text) for q in seen]
    if self.best_of is None:
      path = self.folder / "answers.jsonl"
      answerer = answering.Answerer(run, self.variables, sampling, path)
      made = [first for first, *_ in answerer.generate_replies(queries, self._tell)]
    else:
      made = self._best(run, queries, sampling)
    found = [
      BenchmarkReply(text, stopped) if fits else None for text, stopped, fits in made
    ]
    return self._for_each(questions, seen, found)

  def choose(self, name: str, questions: Sequence[BenchmarkQuestion]) -> list:
    """See protocol.Model."""
    seen = self._seen(questions)
    run, sampling = self._sampling(seen)
    path = self.folder / f"{name}.jsonl"
    made = option_logps.load_or_compute_option_logps(
      run, self.variables, seen, path, batch=sampling.batch, tell=self._tell
    )
    return self._for_each(
      questions, seen, made, ", or an option longer than data.response_len"
    )

  def reward(
    self, questions: Sequence[BenchmarkQuestion], texts: Sequence[str]
  ) -> Iterable[float]:
    """See protocol.Model."""
    assert self.shown.reward
    run, _ = self._sampling(questions)
    examples = [{"video": q.video, "question": q.text} for q in questions]
    return self.shown.reward(run, examples, texts)

  def _best(self, run, queries, sampling) -> list[answering.VideoReply]:
    assert self.best_of
    reference, file, count, by = self.best_of
    config = run.config.evaluate.held_out
    found = best_of_n.load_or_sample_candidates(
      run,
      self.variables,
      reference,
      queries,
      sampling._replace(
        temperature=config.bon_temperature, top_p=1.0, samples=max(config.best_of)
      ),
      file,
      beta=run.config.dpo.beta,
    )
    return best_of_n.choose_best(found, by, count)

  def _seen(self, questions: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """Those whose videos can be read."""
    self.shown.encode([q.video for q in questions])
    store = self.shown.run.features
    lost = [q for q in questions if not store.has(q.video)]
    reason = lambda q: store.failures[features.format_video_name(q.video)]
    self.problems += [SkippedRecord(q.id, reason(q)) for q in lost]
    return [q for q in questions if store.has(q.video)]

  def _sampling(
    self, questions: Sequence[BenchmarkQuestion]
  ) -> tuple[Run, answering.SamplingSettings]:
    """Returns the run and how it samples, with prompts as long as these need."""
    run, config = self.shown.run, self.shown.run.config.copy_and_resolve_references()
    count = run.policy.count_video_tokens(config.model.frames)
    texts = {q.text for q in questions}
    prompts = (
      answering.encode_prompt(run, [(t, None)], video_tokens=count) for t in texts
    )
    longest = max((len(prompt.ids) for prompt in prompts), default=1)
    longest = tokenization.round_up_length(longest, multiple=PROMPT_MULTIPLE)
    config.data.prompt_len = min(config.data.prompt_len, longest)
    return run._replace(config=config), answering.read_sampling_settings(
      config, "evaluate"
    )

  def _for_each(self, questions, seen, made, more: str = "") -> list:
    """What was made of each question; None of those longer than a setting allows."""
    limit = f"evaluate.prompt_len={self.shown.run.config.data.prompt_len}{more}"
    found = {q.id: each for q, each in zip(seen, made, strict=True) if each is not None}
    long = [q.id for q in seen if q.id not in found]
    self.problems += [
      SkippedRecord(id, f"longer than {limit}: raise it") for id in long
    ]
    return [found.get(q.id) for q in questions]

  def _tell(self, done: int) -> None:
    self.shown.log.log_progress(self.shown.done, {}, f"{done} answers")


def make_benchmark_policies(
  shown: EncodedRun,
  policies: Mapping[str, Params],
  folder: pathlib.Path,
  counts: Sequence,
) -> dict[str, Policy]:
  """Returns each policy, and the last that DPO has trained once for each best of n.

  Args:
    shown: the run.
    policies: variables by name.
    folder: of a benchmark.
    counts: numbers of answers to take the best of.

  Raises:
    UserError: DPO has trained no policy.
  """
  found = {
    name: Policy(shown, variables, folder / name)
    for name, variables in policies.items()
  }
  if not counts:
    return found
  trained = [name for name in policies if role_params.is_dpo_stage(name)]
  if not trained:
    raise UserError(
      "evaluate.held_out.best_of needs a policy that DPO has trained; set it ()"
    )
  last = trained[-1]
  file = folder / f"best_of_{last}.jsonl"
  for count in counts:
    for by in shown.run.config.evaluate.held_out.bon_reward:
      name = f"{last}@{count}" + (":total" if by == "total" else "")
      best_of = BestOf(policies["sft"], file, count, by)
      found[name] = Policy(shown, policies[last], folder / name, best_of)
  return found


def make_judge(shown: EncodedRun, variables: Params, folder: pathlib.Path) -> CaseJudge:
  """The judge that the config names.

  Args:
    shown: the run.
    variables: of the SFT policy.
    folder: of the stage.
  """
  config = shown.run.config.evaluate
  if config.judge == "exact":
    return world_files.EXACT
  if config.judge == "endpoint":
    server, sees = config.endpoint, config.judge_sees_video
    sent = ("max_tokens", "temperature", *(("frames", "side") if sees else ()))
    facts = {"version": server.model, **{key: server[key] for key in sent}}
    ask = endpoint.Endpoint(server, folder / "endpoint.jsonl").ask
  else:
    sees = True
    sampling = answering.SamplingSettings(
      config.judge_prompt_len, config.judge_max_new, config.batch
    )
    facts = {
      "version": resumable.compute_fingerprint(variables, sampling.cache_key()),
      "template": shown.run.config.model.template,
    }

    def ask(queries: Sequence[JudgeQuery]) -> list[str | None]:
      shown.encode([query.video for query in queries])
      return answering.Answerer(shown.run, variables, sampling).ask_judge(queries)

  def ask_about(cases: Sequence[JudgeCase]) -> list[str | None]:
    shown.run.watch.check("what was answered and judged is kept")
    queries = [
      JudgeQuery(f"rate:{c.id}", c.video if sees else (), c.prompt) for c in cases
    ]
    return ask(queries)

  return CaseJudge(config.judge, facts, ask_about)


def make_pair_judge(
  shown: EncodedRun, variables: Params, path: pathlib.Path
) -> Callable[[list[AnswerPair]], list[PairOutcome]]:
  """Returns a policy as the judge of pairs, asked as it was for the preferences.

  Args:
    shown: the run.
    variables: of the policy.
    path: of the file that saves its verdicts.
  """
  run, label = shown.run, shown.run.config.label
  sampling = answering.SamplingSettings(
    label.judge_prompt_len, label.judge_max_new, run.config.evaluate.batch
  )
  ask = answering.Answerer(run, variables, sampling, path).ask_judge
  return lambda pairs: pairwise_judge.judge_pairs(pairs, ask, run.prompts)
