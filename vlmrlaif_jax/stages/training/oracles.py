"""Who scores or ranks the responses of a group: what a recipe asks for, as a score."""

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
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import endpoint, generative_rm, rankers, rewards
from vlmrlaif_jax.feedback.pairwise_judge import AskFn
from vlmrlaif_jax.feedback.rewards import ScoreFn
from vlmrlaif_jax.runtime import answering, role_params, scoring
from vlmrlaif_jax.runtime.run import Run

ORACLE_KINDS = ("reward", "reward_rank", "list", "pairs", "truth", "grm", "verdict")
SCORE_KINDS = ("reward", "grm", "verdict")  # Those that say by how much.
PROMPTED_KINDS = ("list", "pairs", "grm")  # Those that ask a judge.
ORACLE_CHOICES = {
  "kind": ORACLE_KINDS,
  "judge": ("self", "endpoint"),
  "grm_stage": tuple(role_params.JUDGE_STAGES),
}
MAX_TRANSCRIPT_REPLIES = 4  # Verdicts on a group of responses that samples show,
MAX_TRANSCRIPT_CHARS = 1000  # and characters of what was asked and of what was said.


class Oracle(NamedTuple):
  """Who scores the responses of a group."""

  score: ScoreFn  # For Parts; it reads frozen["reward"] or frozen["example_ids"].
  told: Callable[[], dict[str, float]] = dict  # For the log, of what it scored last.
  # What a judge said of an example's responses, of the same.
  said: Callable[[Example], list[str]] = lambda example: []
  # From what a method tells of responses to the terms that their scores are the sum of.
  terms: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda info: {}


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # "reward": the reward model's scores; "reward_rank": their order; "list": a judge
      # lists a group; "pairs": a judge compares every two of it; "truth": the hidden
      # truth of the embedded world orders it; "grm": a generative reward model scores
      # every two of it; "verdict": of judges that are taught, whether they are right.
      kind=placeholder(str),
      judge="self",  # Of "list", "pairs" and "grm": a model of ours, or an "endpoint".
      prompt_len=256,  # Tokens of what a judge of ours is asked.
      max_new=12,
      batch=64,  # Queries at once.
      stop_penalty=-1.0,  # Of "reward", for a response without an end.
      length_coef=0.0,  # Of "reward", times length / response_len.
      noise=0.0,  # Share of the responses whose ranks are shuffled, for studies.
      grm_stage="grm",  # That "grm" is of; or "grm_sft", or the untrained "sft".
      both_orders=True,  # Of "grm": n (n - 1) queries for n responses, or half of it.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the settings of an oracle.

  Raises:
    ValueError: a value is wrong. The message starts with "oracle.".
  """
  with subsection("oracle"):
    check_choices(config, ORACLE_CHOICES)
    check_at_least(config, {"batch": 1, "prompt_len": 1, "max_new": 1})
    if config.kind in SCORE_KINDS and config.noise:
      raise ValueError(
        f"noise={config.noise} applies to ranks only, but oracle.kind={config.kind} "
        "gives scores: set oracle.noise=0, or oracle.kind=reward_rank"
      )
    if config.judge == "endpoint" and config.kind in PROMPTED_KINDS:
      with subsection("endpoint"):
        endpoint.check(config.endpoint)


def make_oracle(
  run: Run, config: ConfigDict, examples: Sequence[Example], folder: pathlib.Path
) -> Oracle:
  """Returns the oracle that a config selects.

  Args:
    config: see default_config.
    examples: that frozen["example_ids"] counts.
    folder: of the stage; what an endpoint answered is kept beside it.
  """
  if config.kind == "reward":
    oracle = make_reward_oracle(run, config)
    return oracle._replace(score=jax.jit(oracle.score))
  asked = _Kept(_ask(run, config, folder) if config.kind in PROMPTED_KINDS else list)
  compare = _Kept(_compare(run, config, examples, asked))
  read = functools.partial(tokenization.decode_responses, run.tokenizer)
  eos = run.eos if config.kind in SCORE_KINDS else None  # Ranks are of all responses.
  score = rankers.make_score_fn(compare, examples, read, eos=eos)
  told = TRANSCRIPT_METRICS.get(config.kind, lambda last: {})
  said = functools.partial(_said, asked)
  return Oracle(score, lambda: told(compare.result), said)


class _Kept:
  """A function that keeps its last arguments and its last result."""

  def __init__(self, call: Callable[..., Any]):
    self.call = call
    self.args: tuple[Any, ...] = ((),)
    self.result: Any = ()

  def __call__(self, *args: Any) -> Any:
    self.args, self.result = args, self.call(*args)
    return self.result


def _said(asked: _Kept, example: Example) -> list[str]:
  """What a judge said last of an example's responses."""
  made = []
  for query, reply in zip(asked.args[0], asked.result, strict=True):
    # A query is named for its example, after what tells it from others on the same;
    # what stands in it before the question are the rules of the judge.
    if query.id.endswith(f":{example['id']}"):
      start = max(query.prompt.find(example["question"]), 0)
      verdict = "(nothing)" if reply is None else reply[:MAX_TRANSCRIPT_CHARS]
      made.append(f"{query.prompt[start:][:MAX_TRANSCRIPT_CHARS]} → {verdict}")
  return made[:MAX_TRANSCRIPT_REPLIES]


# What is logged of the last comparison.
TRANSCRIPT_METRICS: dict[str, Callable[[rankers.Comparison], dict[str, float]]] = {
  "grm": lambda last: {
    "judge_calls": float(last.calls),
    "judge_unread": last.unread / max(last.calls, 1),
  },
  "verdict": lambda last: {
    "accuracy": float(last.scores.mean()),
    "unread": last.unread / max(last.calls, 1),
  },
}


def make_reward_oracle(run: Run, config: ConfigDict) -> Oracle:
  """Returns the reward model's scores, with the rules; see rewards.make_reward_fn.

  Args:
    config: a section with stop_penalty and length_coef.
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
  score = rewards.make_reward_fn(run.reward_model, suffix=suffix, eos=run.eos, **rules)
  return Oracle(score, terms=terms)


def _compare(
  run: Run, config: ConfigDict, examples: Sequence[Example], ask: AskFn
) -> rankers.CompareFn:
  style = generative_rm.JUDGE_STYLES[run.config.model.prompts]
  if config.kind == "verdict":
    if not all("better" in e.get("truth", {}) for e in examples):
      raise UserError(
        "oracle.kind=verdict scores verdicts on pairs, and these prompts ask for none: "
        "it is of the stage grm; take another oracle.kind"
      )
    return generative_rm.compare_by_verdict(style)
  if config.kind == "grm":
    return generative_rm.compare_in_pairs(ask, style, both_orders=config.both_orders)
  if config.kind == "truth":
    ranked = rankers.truth_ranker(truth.count_answer_mistakes)
  elif config.kind == "reward_rank":
    variables = role_params.load_reward_model(run)
    ranked = rankers.score_ranker(
      functools.partial(scoring.score_texts, run, variables)
    )
  elif config.kind == "list":
    ranked = rankers.listwise_ranker(ask)
  else:
    ranked = rankers.pairwise_ranker(ask, run.prompts)
  if config.noise:
    ranked = rankers.noisy_ranker(ranked, share=config.noise, seed=run.config.seed)
  return ranked


def _ask(run: Run, config: ConfigDict, folder: pathlib.Path) -> AskFn:
  """Returns an endpoint, or a judge of ours at temperature 0."""
  if config.judge == "endpoint":
    return endpoint.Endpoint(config.endpoint, folder.parent / "endpoint.jsonl").ask
  name = config.grm_stage if config.kind == "grm" else "sft"
  sampling = answering.SamplingSettings(config.prompt_len, config.max_new, config.batch)
  variables = role_params.load_judge(run, name)
  return answering.Answerer(run, variables, sampling).ask_judge
