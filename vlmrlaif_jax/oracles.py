"""Who scores or ranks the responses of a group: what a recipe asks for, as a score."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vlmrlaif_jax import answer, build, label, roles, scoring
from vlmrlaif_jax.data import text
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world as truth
from vlmrlaif_jax.feedback import endpoint, rank, rewards

KINDS = ("reward", "scorer", "list", "pairs", "truth")
JUDGES = ("self", "endpoint")


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # "reward": the reward model's scores; "scorer": their order; "list": a judge
      # lists a group; "pairs": a judge compares every two of it; "truth": the hidden
      # truth of the embedded world orders it.
      kind="scorer",
      judge="self",  # Of "list" and "pairs": the SFT policy, or an "endpoint".
      prompt_len=256,  # Tokens of what the policy is asked as a judge.
      max_new=12,
      batch=64,  # Queries at once.
      stop_penalty=-1.0,  # Of "reward", for a response without an end.
      length_coef=0.0,  # Of "reward", times length / response_len.
      noise=0.0,  # Share of the responses whose ranks are shuffled, for studies.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Refuses an oracle that there is not."""
  for key, known in (("kind", KINDS), ("judge", JUDGES)):
    if config[key] not in known:
      raise ValueError(f"oracle.{key} must be one of {known}, not {config[key]!r}")
  if config.kind == "reward" and config.noise:
    raise ValueError(
      f"oracle.noise={config.noise} is of ranks, and oracle.kind=reward gives scores: "
      "set oracle.kind=scorer"
    )


def make(
  run: build.Run, config: ConfigDict, examples: Sequence[Example], folder: pathlib.Path
) -> Any:
  """A score for Parts; it reads frozen["reward"] or frozen["asked"].

  Args:
    examples: that frozen["asked"] counts.
    folder: of the stage; what an endpoint answered is kept beside it.
  """
  check(config)
  if config.kind == "reward":
    return jax.jit(reward(run, config.stop_penalty, config.length_coef))
  ranked = _rank(run, config, folder)
  if config.noise:
    ranked = rank.shuffled(ranked, share=config.noise, seed=run.config.seed)
  read = functools.partial(text.responses_text, run.tokenizer)
  return rank.as_score(ranked, examples, read)


def reward(run: build.Run, penalty: float, length_coef: float) -> rewards.Score:
  """The reward model and the rules; see rewards.reward."""
  return rewards.reward(
    run.scorer,
    suffix=tuple(text.suffix_ids(run.tokenizer, run.prompts.reward)),
    eos=run.eos,
    penalty=penalty,
    length_coef=length_coef,
    longest=run.config.data.response_len,
  )


def _rank(run, config, folder) -> rank.Rank:
  if config.kind == "truth":
    return rank.by_truth(truth.mistakes)
  if config.kind == "scorer":
    variables = roles.reward_variables(run)
    return rank.by_scores(functools.partial(scoring.score_texts, run, variables))
  if config.judge == "endpoint":
    ask = endpoint.Endpoint(config.endpoint, folder.parent / "endpoint.sqlite").ask
  else:
    ask = _policy(run, config)
  return rank.by_list(ask) if config.kind == "list" else rank.by_wins(ask, run.prompts)


def _policy(run, config) -> rank.Ask:
  """The SFT policy as a judge, at temperature 0."""
  variables = roles.policies(run)["sft"]
  sampling = answer.Sampling(config.prompt_len, config.max_new, config.batch)

  def ask(queries):
    requests = [answer.Request(*query) for query in queries]
    replies = answer.answer(run, variables, requests, sampling, seed=run.config.seed)
    return label.first_texts(replies)

  return ask
