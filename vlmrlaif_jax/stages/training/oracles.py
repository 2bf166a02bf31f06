"""Builds the oracle that a config selects: it scores or ranks groups of responses.

The kinds "reward" and "reward_rank" combine the terms of the section `reward`.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  subsection,
)
from vlmrlaif_jax.core.types import ModelPass
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.templates import show_media
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import endpoint, generative_rm, rankers, rewards
from vlmrlaif_jax.feedback.pairwise_judge import AskFn
from vlmrlaif_jax.feedback.rewards import ScoreFn
from vlmrlaif_jax.feedback.terms import scorer
from vlmrlaif_jax.feedback.terms.sample import Sample
from vlmrlaif_jax.feedback.terms.scorer import RewardScores
from vlmrlaif_jax.runtime import (
  answering,
  rewarding,
  role_params,
  scoring,
  workloads,
)
from vlmrlaif_jax.runtime.run import Run

ORACLE_KINDS = ("reward", "reward_rank", "list", "pairs", "truth", "grm", "verdict")
# Kinds that return scores; the others return ranks.
SCORE_KINDS = ("reward", "grm", "verdict")
REWARD_KINDS = ("reward", "reward_rank")  # Kinds that read the section `reward`.
PROMPTED_KINDS = ("list", "pairs", "grm")  # Kinds that prompt a judge.
ORACLE_CHOICES = {
  "kind": ORACLE_KINDS,
  "judge": ("self", "endpoint"),
  "grm_stage": tuple(role_params.JUDGE_STAGES),
}
MAX_TRANSCRIPT_REPLIES = 4  # Replies of a judge per group in the samples.
MAX_TRANSCRIPT_CHARS = 1000  # Characters of a query and of a reply in the samples.


class TermValues(NamedTuple):
  """The terms of a batch's scores by name."""

  raw: Mapping[str, Float[np.ndarray, " rows"]]  # Values of the functions.
  weighted: Mapping[str, Float[np.ndarray, " rows"]]  # Parts whose sum is the score.


NO_TERMS = TermValues({}, {})


class Oracle(NamedTuple):
  """A scoring function for groups of responses, and its metrics."""

  score: ScoreFn  # Reads frozen["reward"] or frozen["example_ids"].
  # Metrics of the last batch.
  get_metrics: Callable[[], dict[str, float]] = dict
  # Replies of the judge about an example's responses in the last batch.
  list_replies: Callable[[Example], list[str]] = lambda example: []
  # Terms of the scores of the last batch.
  get_terms: Callable[[], TermValues] = lambda: NO_TERMS
  # Returns the rewards to report for the scores of groups, if they are ranks.
  report: Callable[[np.ndarray], np.ndarray] | None = None


def default_config() -> ConfigDict:
  """Returns the default settings of an oracle."""
  return ConfigDict(
    dict(
      # "reward": scores by the section `reward`; "reward_rank": ranks by these scores;
      # "list": a judge ranks a group; "pairs": a judge compares all pairs of a group;
      # "truth": ranks by the ground truth of the embedded world; "grm": a generative
      # reward model scores all pairs of a group; "verdict": whether the verdict of a
      # trained judge is correct.
      kind=placeholder(str),
      judge="self",  # Judge of "list", "pairs" and "grm": "self" or "endpoint".
      prompt_len=256,  # Tokens of a prompt of the judge "self".
      max_new=12,  # Tokens of a reply of the judge "self".
      batch=64,  # Queries per batch.
      noise=0.0,  # Share of pairs that are ranked in the wrong order, for studies.
      # Stage of the judge "grm": "grm", "grm_sft" or "sft" (untrained).
      grm_stage="grm",
      both_orders=True,  # Whether "grm" judges each pair in both orders.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the settings of an oracle.

  Raises:
    ValueError: A value is invalid. The message starts with "oracle.".
  """
  with subsection("oracle"):
    check_choices(config, ORACLE_CHOICES)
    check_at_least(config, {"batch": 1, "prompt_len": 1, "max_new": 1})
    check_at_least(config, {"noise": 0})
    if config.noise > 1:
      raise ValueError(f"noise must be at most 1, not {config.noise}")
    if config.kind in SCORE_KINDS and config.noise:
      raise ValueError(
        f"noise={config.noise} applies to ranks only, but oracle.kind={config.kind} "
        "returns scores: set oracle.noise=0, or oracle.kind=reward_rank"
      )
    if config.judge == "endpoint" and config.kind in PROMPTED_KINDS:
      with subsection("endpoint"):
        endpoint.check(config.endpoint)


def make_oracle(
  run: Run, config: ConfigDict, examples: Sequence[Example], folder: pathlib.Path
) -> Oracle:
  """Returns the oracle that a config selects.

  Args:
    run: The run.
    config: See default_config.
    examples: Examples that frozen["example_ids"] indexes.
    folder: Folder of the stage. Replies of an endpoint are saved in its parent.
  """
  if config.kind in REWARD_KINDS:
    oracle = make_reward_oracle(run, examples, folder)
    if config.kind == "reward_rank":
      oracle = _rank_rewards(run, config, oracle, examples)
    return oracle
  ask: AskFn = lambda queries: []
  get_server_metrics: Callable[[], dict[str, float]] = dict
  if config.kind in PROMPTED_KINDS:
    if config.judge == "endpoint":
      server = endpoint.Endpoint(config.endpoint, folder.parent / "endpoint.jsonl")
      ask, get_server_metrics = server.ask, server.get_metrics
    else:
      ask = _make_local_ask_fn(run, config)
  calls = _CallRecorder(ask)
  compare = _CallRecorder(_make_compare_fn(run, config, examples, calls))
  decode = functools.partial(tokenization.decode_responses, run.tokenizer)
  # Ranks include truncated responses.
  stops = run.stops if config.kind in SCORE_KINDS else ()
  score = rankers.make_score_fn(compare, examples, decode, stops=stops)
  compute_metrics = TRANSCRIPT_METRICS.get(config.kind, lambda last: {})
  list_replies = functools.partial(_format_replies, calls)
  get_metrics = lambda: compute_metrics(compare.result) | get_server_metrics()
  oracle = Oracle(score, get_metrics, list_replies)
  if config.kind in SCORE_KINDS:
    return oracle
  return oracle._replace(report=rankers.compute_win_rates)


class _CallRecorder:
  """A function that stores its last arguments and its last result."""

  def __init__(self, call: Callable[..., Any]):
    self.call = call
    self.args: tuple[Any, ...] = ((),)
    self.result: Any = ()

  def __call__(self, *args: Any) -> Any:
    self.args, self.result = args, self.call(*args)
    return self.result


def _format_replies(calls: _CallRecorder, example: Example) -> list[str]:
  """Formats the judge's last replies about an example's responses."""
  lines = []
  for query, reply in zip(calls.args[0], calls.result, strict=True):
    # The id of a query ends with that of its example. The prompt starts with the
    # judge's rules, so the transcript starts at the question.
    if query.id.endswith(f":{example['id']}"):
      start = max(query.prompt.find(example["question"]), 0)
      verdict = "(nothing)" if reply is None else reply[:MAX_TRANSCRIPT_CHARS]
      prompt = show_media(query.prompt[start:])[:MAX_TRANSCRIPT_CHARS]
      lines.append(f"{prompt} → {verdict}")
  return lines[:MAX_TRANSCRIPT_REPLIES]


def _count_unread(last: rankers.Comparison) -> dict[str, float]:
  return {
    "judge_calls": float(last.calls),
    "judge_unread": last.unread / max(last.calls, 1),
  }


# Metrics of the last comparison by kind.
TRANSCRIPT_METRICS: dict[str, Callable[[rankers.Comparison], dict[str, float]]] = {
  **dict.fromkeys(PROMPTED_KINDS, _count_unread),
  "verdict": lambda last: {
    "accuracy": float(last.scores.mean()),
    "unread": last.unread / max(last.calls, 1),
  },
}


class _RewardScorer:
  """Scores batches by the section `reward`, and stores the result of the last one.

  The reward model is one jitted call. Other terms are computed on the host.
  """

  def __init__(self, run: Run, examples: Sequence[Example], folder: pathlib.Path):
    self.last: RewardScores
    self._run, self._examples, self._folder = run, examples, folder
    self._terms = rewarding.load_reward_terms(
      run, run.config.reward, folder.parent / "endpoint.jsonl"
    )
    self._has_failed = False
    self._score_by_model = make_model_scorer(run)

  def __call__(self, frozen: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    model_scores = None
    if scorer.has_model_term(self._run.config.reward):
      computed, _ = self._score_by_model(frozen, batch)
      model_scores = distributed.fetch_arrays(computed)
    tokens, mask = distributed.fetch_arrays((batch.tokens, batch.loss_mask))
    indices = np.asarray(frozen["example_ids"])
    group = len(tokens) // len(indices)
    examples = [self._examples[i] for i in np.repeat(indices, group)]
    samples = rewarding.make_batch_samples(self._run, examples, tokens, mask)
    config = self._run.config.reward
    self.last = scorer.score_samples(
      config, self._terms, samples, model_scores, group=group
    )
    self._note_failures(samples, scorer.raise_if_invalid(config, samples, self.last))
    return self.last.scores.astype(np.float32), self.last.valid

  def _note_failures(self, samples: Sequence[Sample], line: str) -> None:
    """Logs the invalid samples; the first traceback is also saved."""
    if line and not self._has_failed:
      self._has_failed = True
      path = self._folder / "first_reward_failure.txt"
      distributed.on_process_zero(lambda: path.write_text(f"{line}\n"))
    if line:
      distributed.print_once(line.splitlines()[0])


def make_model_scorer(run: Run) -> ScoreFn:
  """Returns the jitted scorer of the reward model alone."""
  suffix = scoring.encode_reward_prompt(run)
  return jax.jit(rewards.make_model_score(run.reward_model, suffix))


def needs_reward_model(config: ConfigDict, oracle: ConfigDict) -> bool:
  """Returns whether an oracle of a config reads the trained reward model."""
  return oracle.kind in REWARD_KINDS and scorer.has_model_term(config.reward)


def plan_scoring(
  run: Run, rows: int, time: int, *, has_reward_model: bool
) -> tuple[ScoreFn, dict[str, list[ModelPass]]]:
  """Returns the part of a score that runs on the devices, and its passes by name.

  Args:
    run: The run.
    rows: Responses of a step.
    time: Tokens of a prompt and a response.
    has_reward_model: Whether the reward model is a term of the score.
  """
  if not has_reward_model:
    return _return_zeros, {}
  return make_model_scorer(run), {
    "score": [workloads.make_reward_pass(run, rows, time)]
  }


def _return_zeros(frozen, batch):
  rows = len(batch.tokens)
  return jnp.zeros(rows), jnp.ones(rows, bool)


def make_reward_oracle(
  run: Run, examples: Sequence[Example], folder: pathlib.Path
) -> Oracle:
  """Returns the oracle that combines the terms of the section `reward`.

  It reads frozen["reward"] if the reward model is one of the terms.
  """
  score = _RewardScorer(run, examples, folder)
  return Oracle(
    score,
    get_metrics=lambda: scorer.compute_term_metrics(score.last),
    get_terms=lambda: TermValues(score.last.raw, score.last.weighted),
  )


def _rank_rewards(
  run: Run, config: ConfigDict, oracle: Oracle, examples: Sequence[Example]
) -> Oracle:
  """Returns an oracle that ranks by the scores of another one."""
  decode = functools.partial(tokenization.decode_responses, run.tokenizer)

  def score(frozen: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, valid = oracle.score(frozen, batch)
    known = np.where(valid, scores, np.nan)
    compare = _add_noise(run, config, rankers.score_ranker(lambda *_: known))
    return rankers.make_score_fn(compare, examples, decode, stops=())(frozen, batch)

  return oracle._replace(
    score=score, get_terms=lambda: NO_TERMS, report=rankers.compute_win_rates
  )


def _add_noise(
  run: Run, config: ConfigDict, ranker: rankers.CompareFn
) -> rankers.CompareFn:
  if not config.noise:
    return ranker
  return rankers.noisy_ranker(ranker, share=config.noise, seed=run.config.seed)


def _make_compare_fn(
  run: Run, config: ConfigDict, examples: Sequence[Example], ask: AskFn
) -> rankers.CompareFn:
  style = generative_rm.JUDGE_STYLES[run.config.model.prompts]
  if config.kind == "verdict":
    if not all("better" in e.get("truth", {}) for e in examples):
      raise UserError(
        "oracle.kind=verdict requires prompts of the stage grm, which ask for verdicts "
        "on pairs: set another oracle.kind"
      )
    return generative_rm.compare_by_verdict(style)
  if config.kind == "grm":
    return generative_rm.compare_in_pairs(ask, style, both_orders=config.both_orders)
  if config.kind == "truth":
    ranker = rankers.truth_ranker(truth.count_answer_mistakes)
  elif config.kind == "list":
    ranker = rankers.listwise_ranker(ask)
  else:
    ranker = rankers.pairwise_ranker(ask, run.prompts)
  return _add_noise(run, config, ranker)


def _make_local_ask_fn(run: Run, config: ConfigDict) -> AskFn:
  """Returns a policy of the workdir as the judge, at temperature 0."""
  name = config.grm_stage if config.kind == "grm" else "sft"
  sampling = answering.SamplingSettings(config.prompt_len, config.max_new, config.batch)
  variables = role_params.load_judge(run, name)
  return answering.Answerer(run, variables, sampling).ask_judge
