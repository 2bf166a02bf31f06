"""Builds the oracle that a config selects: it scores or ranks groups of responses."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  subsection,
)
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.templates import show_media
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import endpoint, generative_rm, rankers, rewards
from vlmrlaif_jax.feedback.pairwise_judge import AskFn
from vlmrlaif_jax.feedback.rewards import ScoreFn
from vlmrlaif_jax.runtime import answering, role_params, scoring
from vlmrlaif_jax.runtime.run import Run

ORACLE_KINDS = ("reward", "reward_rank", "list", "pairs", "truth", "grm", "verdict")
# Kinds that return scores; the others return ranks.
SCORE_KINDS = ("reward", "grm", "verdict")
PROMPTED_KINDS = ("list", "pairs", "grm")  # Kinds that prompt a judge.
ORACLE_CHOICES = {
  "kind": ORACLE_KINDS,
  "judge": ("self", "endpoint"),
  "grm_stage": tuple(role_params.JUDGE_STAGES),
}
MAX_TRANSCRIPT_REPLIES = 4  # Replies of a judge per group in the samples.
MAX_TRANSCRIPT_CHARS = 1000  # Characters of a query and of a reply in the samples.


class Oracle(NamedTuple):
  """A scoring function for groups of responses, and its metrics."""

  score: ScoreFn  # Reads frozen["reward"] or frozen["example_ids"].
  # Metrics of the last batch.
  get_metrics: Callable[[], dict[str, float]] = dict
  # Replies of the judge about an example's responses in the last batch.
  list_replies: Callable[[Example], list[str]] = lambda example: []
  # Splits scores into terms: info of `collect` -> terms with the sum of the scores.
  terms: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda info: {}


def default_config() -> ConfigDict:
  """Returns the default settings of an oracle."""
  return ConfigDict(
    dict(
      # "reward": scores of the reward model; "reward_rank": ranks by the reward model;
      # "list": a judge ranks a group; "pairs": a judge compares all pairs of a group;
      # "truth": ranks by the ground truth of the embedded world; "grm": a generative
      # reward model scores all pairs of a group; "verdict": whether the verdict of a
      # trained judge is correct.
      kind=placeholder(str),
      judge="self",  # Judge of "list", "pairs" and "grm": "self" or "endpoint".
      prompt_len=256,  # Tokens of a prompt of the judge "self".
      max_new=12,  # Tokens of a reply of the judge "self".
      batch=64,  # Queries per batch.
      stop_penalty=-1.0,  # Added to the score of "reward" for a response without EOS.
      length_coef=0.0,  # Coefficient of length / response_len in "reward"; 0 disables.
      noise=0.0,  # Share of responses with shuffled ranks, for studies; 0 disables.
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
  if config.kind == "reward":
    oracle = make_reward_oracle(run, config)
    return oracle._replace(score=jax.jit(oracle.score))
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
  return Oracle(score, get_metrics, list_replies)


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


def make_reward_oracle(run: Run, config: ConfigDict) -> Oracle:
  """Returns the oracle of the reward model's scores; see rewards.make_reward_fn.

  `config` is a section with stop_penalty and length_coef.
  """
  rules = dict(
    penalty=config.stop_penalty,
    length_coef=config.length_coef,
    max_response_len=run.config.data.response_len,
  )
  suffix = scoring.encode_reward_prompt(run)
  terms = lambda info: rewards.split_reward_terms(
    np.asarray(info["scores"]),
    np.asarray(info["loss_mask"]).sum(axis=1),
    np.asarray(info["has_stop"]),
    **rules,
  )
  score = rewards.make_reward_fn(
    run.reward_model, suffix=suffix, stops=run.stops, **rules
  )
  return Oracle(score, terms=terms)


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
  elif config.kind == "reward_rank":
    variables = role_params.load_reward_model(run)
    ranker = rankers.score_ranker(
      functools.partial(scoring.score_texts, run, variables)
    )
  elif config.kind == "list":
    ranker = rankers.listwise_ranker(ask)
  else:
    ranker = rankers.pairwise_ranker(ask, run.prompts)
  if config.noise:
    ranker = rankers.noisy_ranker(ranker, share=config.noise, seed=run.config.seed)
  return ranker


def _make_local_ask_fn(run: Run, config: ConfigDict) -> AskFn:
  """Returns a policy of the workdir as the judge, at temperature 0."""
  name = config.grm_stage if config.kind == "grm" else "sft"
  sampling = answering.SamplingSettings(config.prompt_len, config.max_new, config.batch)
  variables = role_params.load_judge(run, name)
  return answering.Answerer(run, variables, sampling).ask_judge
