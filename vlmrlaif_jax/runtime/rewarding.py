"""Samples of a run for the terms of its reward, the terms, and the scores of texts."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.types import is_stop
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.templates import show_media
from vlmrlaif_jax.feedback.pairwise_judge import (
  AskFn,
  JudgeQuery,
  ask_unique,
  make_query_key,
)
from vlmrlaif_jax.feedback.terms import scorer
from vlmrlaif_jax.feedback.terms.sample import Sample, make_seed
from vlmrlaif_jax.feedback.terms.scorer import RewardScores, Term
from vlmrlaif_jax.runtime import answering, role_params, scoring, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import DeviceFunction

# Scores a text as the response to each example, which may have no EOS:
# (run, examples, texts, whether each has EOS) -> scores.
TextScorer: TypeAlias = Callable[
  [Run, Sequence[Mapping[str, Any]], Sequence[str], Sequence[bool]], RewardScores
]


def load_reward_terms(run: Run, config: ConfigDict, cache: pathlib.Path) -> list[Term]:
  """Loads the terms of a reward, and the SFT policy if it judges one of them.

  Args:
    run: The run.
    config: The section `reward`.
    cache: JSONL file of replies of servers.
  """
  ask = make_self_judge(run, config) if scorer.has_self_judge(config) else None
  return scorer.load_terms(config, cache, ask)


def make_self_judge(run: Run, config: ConfigDict) -> AskFn:
  """Returns the SFT policy of the workdir as the judge of terms, at temperature 0.

  A query whose prompt is too long has no reply. A line gives their number.

  Args:
    run: The run.
    config: The section `reward`, whose `self_judge` has the lengths.
  """
  lengths = config.self_judge
  sampling = answering.SamplingSettings(
    lengths.prompt_len, lengths.max_new, lengths.batch
  )
  judge = answering.Answerer(run, role_params.load_judge(run, "sft"), sampling)

  def ask(queries: Sequence[JudgeQuery]) -> list[str | None]:
    replies = ask_unique(judge.ask_judge, queries)
    if too_long := sum(reply is None for reply in replies.values()):
      distributed.print_once(
        f"reward: {too_long} of {len(replies)} prompts of the judge are longer than "
        f"--config.reward.self_judge.prompt_len={lengths.prompt_len}; their samples "
        "have no score"
      )
    return [replies[make_query_key(query)] for query in queries]

  return ask


def plan_self_judge(run: Run, rows: int) -> list[DeviceFunction]:
  """Returns the device functions of a judge "self" with a query for each response.

  Args:
    run: The run.
    rows: Responses of a step.
  """
  if not scorer.has_self_judge(run.config.reward):
    return []
  return [workloads.make_judge_function(run, run.config.reward.self_judge, rows)]


def make_batch_samples(
  run: Run,
  examples: Sequence[Mapping[str, Any]],
  tokens: Int[np.ndarray, "batch time"],
  mask: Bool[np.ndarray, "batch time"],
) -> list[Sample]:
  """Returns the samples of a batch of responses.

  Args:
    run: The run.
    examples: The example of each response.
    tokens: Token ids of prompts and responses.
    mask: True for the tokens of responses, including EOS.
  """
  texts = tokenization.decode_responses(run.tokenizer, tokens, mask)
  stopped = np.any(is_stop(tokens, run.stops) & mask, axis=1)
  ids = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
  return [
    make_sample(run, *each) for each in zip(examples, texts, ids, stopped, strict=True)
  ]


def make_text_scorer(run: Run) -> TextScorer | None:
  """Returns a scorer of texts by the section `reward`; None if that is not possible.

  Without the section, the reward model of the workdir scores alone. A reward that the
  reward model is a term of requires a trained one.
  """
  has_model = role_params.has_reward_model(run)
  settings = scorer.default_config()
  settings.terms.stop.weight = 0.0
  settings = run.config.get("reward", settings).copy_and_resolve_references()
  settings.combine = "sum"  # There are no groups.
  if scorer.has_model_term(settings) and not has_model:
    return None
  terms = load_reward_terms(run, settings, run.workdir / "endpoint.jsonl")
  variables = None
  if scorer.has_model_term(settings):
    variables = role_params.load_reward_model(run)

  def score(run, examples, texts, stopped):
    model_scores = None
    if variables is not None:
      model_scores = scoring.score_texts(run, variables, examples, texts)
    rows = zip(examples, texts, stopped, strict=True)
    samples = [_make_text_sample(run, *row) for row in rows]
    return scorer.score_samples(settings, terms, samples, model_scores)

  return score


def _make_text_sample(
  run: Run, example: Mapping[str, Any], text: str, stopped: bool
) -> Sample:
  """Returns the sample of a text, with the tokens of the tokenizer and EOS."""
  tokens = run.tokenizer(text, add_special_tokens=False)["input_ids"]
  return make_sample(run, example, text, [*tokens, *run.stops[: int(stopped)]], stopped)


def make_sample(
  run: Run,
  example: Mapping[str, Any],
  text: str,
  tokens: Sequence[int],
  stopped: bool | np.bool_,
) -> Sample:
  """Returns the sample of a response to an example."""
  id, fields = example["id"], example.get("fields", {})
  own = {key: value for key, value in example.items() if key != "fields"}
  return Sample(
    id=id,
    prompt=show_media(example["question"]),
    response=text,
    tokens=tuple(tokens),
    stopped=bool(stopped),
    max_tokens=run.config.data.response_len,
    answer=example.get("answer", ""),
    record={**fields, **own},
    video=example["video"],
    seed=make_seed(run.config.seed, id, text),
  )
