"""The score of a response: a combination of the terms of the section `reward`."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  subsection,
)
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.pairwise_judge import AskFn
from vlmrlaif_jax.feedback.terms import claims, functions, rank, rubric, servers
from vlmrlaif_jax.feedback.terms.functions import Limits
from vlmrlaif_jax.feedback.terms.rules import REWARD_RULES
from vlmrlaif_jax.feedback.terms.sample import Sample
from vlmrlaif_jax.feedback.terms.servers import JudgeSources

TermFunction: TypeAlias = Callable[[Sequence[Sample]], Any]

REWARD_MODEL = "reward_model"  # Term that the trained reward model computes.
# Terms of judges by name: (kwargs, judges) -> function of samples. It divides the
# samples among the processes by itself.
JUDGE_TERMS: dict[str, Callable[[Mapping[str, Any], JudgeSources], TermFunction]] = {
  "judge": servers.make_judge_term,
  "claims": claims.make_claims_term,
  "rubric": rubric.make_rubric_term,
  "rank": rank.make_rank_term,
}
GROUP_TERMS = ("rank",)  # Terms that compare the responses to one prompt.
EPSILON = 1e-4  # Added to the deviation of a group or a batch, as in GRPO.
MAX_IDS = 5  # Ids of invalid samples in a message.


def default_config() -> ConfigDict:
  """Returns the settings of the section `reward`."""
  return ConfigDict(
    dict(
      # Terms by name. A term is "FILE.py:FUNCTION", "PACKAGE.MODULE:FUNCTION" or a
      # built-in name as "fn" (by default the name of the term), with its "weight" (0
      # disables it) and the arguments "kwargs" of the function.
      terms=dict(
        # Score of the trained reward model.
        reward_model=dict(fn=REWARD_MODEL, weight=1.0),
        # 1 for a response without EOS, so that a weight below 0 is a penalty.
        stop=dict(fn="stop", weight=-1.0),
        # Tokens of the response / data.response_len.
        length=dict(fn="length", weight=0.0),
      ),
      # Server of the terms judge, claims, rubric and rank; their "kwargs" override it.
      endpoint=endpoint.default_config(),
      # The SFT policy as the judge of terms with kwargs.judge="self".
      self_judge=dict(
        prompt_len=2048,  # Tokens of its prompt, video included.
        max_new=256,  # Tokens of its reply.
        batch=64,  # Queries per batch.
      ),
      # "sum" of the weighted terms, or "group" (GDPO, 2601.05242), for GRPO only: each
      # term is first normalized within its group of responses, and the sum over the
      # batch.
      combine="sum",
      concurrency=8,  # Concurrent calls of an async function, per process.
      timeout_s=60.0,  # Seconds of a call: a sample, or a batch without async.
      max_invalid=0.5,  # Share of a batch's invalid samples above which a run stops.
    )
  )


class _TermSettings(NamedTuple):
  """The settings of a term with a weight."""

  name: str
  fn: str
  weight: float
  kwargs: dict[str, Any]


class Term(NamedTuple):
  """A term of the reward."""

  name: str
  weight: float
  # Function of samples; None for a term that the caller computes.
  function: TermFunction | None
  # Whether the function divides the samples among the processes by itself.
  is_distributed: bool = False


class RewardScores(NamedTuple):
  """Scores of responses, and the terms that they are combined from."""

  scores: Float[np.ndarray, " rows"]  # Undefined where not valid.
  valid: Bool[np.ndarray, " rows"]
  raw: dict[str, Float[np.ndarray, " rows"]]  # Values by term; NaN where invalid.
  weighted: dict[str, Float[np.ndarray, " rows"]]  # Parts whose sum is the score.
  failures: dict[str, str]  # Reason of each term's first invalid sample.


def load_terms(
  config: ConfigDict, cache: pathlib.Path | None, ask_self: AskFn | None = None
) -> list[Term]:
  """Loads the functions of all terms with a weight.

  Args:
    config: The section `reward`.
    cache: JSONL file of replies of servers. None saves nothing.
    ask_self: The SFT policy, the judge "self"; see has_self_judge.

  Raises:
    ValueError: A setting of a term is invalid. The message starts with its name.
  """
  builtin: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((REWARD_MODEL, *JUDGE_TERMS), _raise_not_computed),
    "endpoint": servers.request_rewards,
    **REWARD_RULES,
  }
  sources = JudgeSources(config.endpoint, cache, ask_self)
  for name, settings in config.terms.items():
    if unknown := set(settings) - {"fn", "weight", "kwargs"}:
      raise ValueError(
        f"terms.{name}.{unknown.pop()} is no setting of a term: give fn, weight and "
        "kwargs"
      )
  terms = []
  for name, text, weight, kwargs in _list_active_terms(config):
    with subsection(f"terms.{name}"):
      if text in JUDGE_TERMS:
        judge = JUDGE_TERMS[text](kwargs, sources)
        terms.append(Term(name, weight, judge, is_distributed=True))
        continue
      loaded = functions.load_function(text, builtin)
      function = functions.bind_arguments(loaded, text, kwargs)
      terms.append(Term(name, weight, None if text == REWARD_MODEL else function))
  return terms


def _list_active_terms(config: ConfigDict) -> list[_TermSettings]:
  """Returns the settings of the terms whose weight is not 0."""
  return [
    _TermSettings(
      name,
      settings.get("fn", name),
      float(settings.get("weight", 1.0)),
      settings.get("kwargs", ConfigDict()).to_dict(),
    )
    for name, settings in config.terms.items()
    if settings.get("weight", 1.0)
  ]


def _raise_not_computed(samples: Sequence[Sample]) -> list[float | None]:
  raise ValueError("the scorer computes this term, not a function")


def check(config: ConfigDict) -> None:
  """Checks the section `reward`, and loads the functions of its terms.

  Raises:
    ValueError: A value is invalid. The message starts with the setting's name.
  """
  check_choices(config, {"combine": COMBINATIONS})
  check_at_least(config, {"concurrency": 1, "timeout_s": 0, "max_invalid": 0})
  with subsection("self_judge"):
    check_at_least(config.self_judge, {"prompt_len": 1, "max_new": 1, "batch": 1})
  if not load_terms(config, cache=None):
    raise ValueError(
      "terms has no term with a weight: give one, or set terms.reward_model.weight=1"
    )


def has_model_term(config: ConfigDict) -> bool:
  """Returns whether the section `reward` has a term of the reward model."""
  return any(term.fn == REWARD_MODEL for term in _list_active_terms(config))


def has_self_judge(config: ConfigDict) -> bool:
  """Returns whether the SFT policy judges a term of the section `reward`."""
  return any(
    term.fn in JUDGE_TERMS and term.kwargs.get("judge") == "self"
    for term in _list_active_terms(config)
  )


def find_group_term(config: ConfigDict) -> str:
  """Returns the name of a term that compares responses to one prompt, "" without."""
  terms = _list_active_terms(config)
  return next((term.name for term in terms if term.fn in GROUP_TERMS), "")


def score_samples(
  config: ConfigDict,
  terms: Sequence[Term],
  samples: Sequence[Sample],
  model_scores: Float[np.ndarray, " rows"] | None,
  *,
  group: int = 1,
) -> RewardScores:
  """Scores responses by all terms. Every process must call it.

  Args:
    config: The section `reward`.
    terms: Terms of `load_terms`.
    samples: The responses, those of one prompt adjacent.
    model_scores: Scores of the reward model; None without such a term.
    group: Responses per prompt.
  """
  raw: dict[str, np.ndarray] = {}
  failures: dict[str, str] = {}
  limits = Limits(config.concurrency, config.timeout_s)
  for name, _, function, is_distributed in terms:
    if function is None:
      raw[name] = np.asarray(model_scores, float)
      reasons = [f"the score is {x}" if not np.isfinite(x) else "" for x in raw[name]]
    else:
      if is_distributed:
        outcomes = functions.read_values(function(samples), len(samples))
      else:
        outcomes = functions.call_function(function, samples, limits)
      values = [np.nan if each.value is None else each.value for each in outcomes]
      raw[name], reasons = np.array(values, float), [each.failure for each in outcomes]
    if any(reasons):
      failures[name] = next(filter(None, reasons))
  weights = {term.name: term.weight for term in terms}
  weighted = COMBINATIONS[config.combine](raw, weights, group)
  scores = np.sum(list(weighted.values()), axis=0)
  return RewardScores(scores, np.isfinite(scores), raw, weighted, failures)


def raise_if_invalid(
  config: ConfigDict, samples: Sequence[Sample], result: RewardScores
) -> str:
  """Returns a line about the invalid samples of a batch, "" without any.

  Raises:
    UserError: Their share is above `max_invalid`, or no sample is valid. The message
      has the first reason of each term that failed.
  """
  invalid = [s.id for s, valid in zip(samples, result.valid, strict=True) if not valid]
  if not invalid:
    return ""
  ids = [*dict.fromkeys(invalid)]
  more = f" and {len(ids) - MAX_IDS} more" if len(ids) > MAX_IDS else ""
  counts = {name: int((~np.isfinite(x)).sum()) for name, x in result.raw.items()}
  by_term = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
  line = (
    f"reward: {len(invalid)} of {len(samples)} samples have no score ({by_term}), of "
    f"the records {', '.join(ids[:MAX_IDS])}{more}"
  )
  reasons = "\n".join(f"{k}: {text.rstrip()}" for k, text in result.failures.items())
  if len(invalid) > config.max_invalid * len(samples) or not result.valid.any():
    raise UserError(
      f"{line}; more than --config.reward.max_invalid={config.max_invalid}. Correct "
      f"the terms, or raise it. The first failure of each term:\n{reasons}"
    )
  return f"{line}. The first failure of each term:\n{reasons}"


def compute_term_metrics(result: RewardScores) -> dict[str, float]:
  """Computes means over valid samples: "terms/NAME" and "terms/NAME/weighted"."""
  metrics = {}
  for name in result.raw:
    for key, values in (("", result.raw), ("/weighted", result.weighted)):
      finite = values[name][np.isfinite(values[name])]
      metrics[f"terms/{name}{key}"] = float(finite.mean()) if len(finite) else np.nan
  return metrics


def _weigh_terms(
  raw: Mapping[str, Float[np.ndarray, " rows"]],
  weights: Mapping[str, float],
  group: int,
) -> dict[str, Float[np.ndarray, " rows"]]:
  return {name: weights[name] * values for name, values in raw.items()}


def _weigh_normalized_terms(
  raw: Mapping[str, Float[np.ndarray, " rows"]],
  weights: Mapping[str, float],
  group: int,
) -> dict[str, Float[np.ndarray, " rows"]]:
  """Returns the parts of GDPO's advantages by term (2601.05242).

  A value is normalized within its group: weight * (value - mean) / (deviation +
  EPSILON). The sum of all terms is then normalized in the same way over the valid
  responses of the batch. The mean of the sum is subtracted by term.
  """
  weighted = {}
  for name, values in raw.items():
    rows = values.reshape(-1, group)
    count = np.isfinite(rows).sum(axis=1, keepdims=True)
    centered = rows - np.nansum(rows, axis=1, keepdims=True) / np.maximum(count, 1)
    variance = np.nansum(centered**2, axis=1, keepdims=True) / np.maximum(count - 1, 1)
    weighted[name] = (weights[name] * centered / (np.sqrt(variance) + EPSILON)).ravel()
  total = np.sum(list(weighted.values()), axis=0)
  valid = np.isfinite(total)
  deviation = np.std(total[valid], ddof=1) if valid.sum() > 1 else 0.0
  center = lambda values: values - (np.mean(values[valid]) if valid.any() else 0.0)
  return {
    name: center(values) / (deviation + EPSILON) for name, values in weighted.items()
  }


COMBINATIONS = {"sum": _weigh_terms, "group": _weigh_normalized_terms}
