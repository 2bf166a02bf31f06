"""The term `rank`: the win rate of a response in its group (2510.02561).

A judge ranks the responses to one prompt. The value of a response is the share of the
others that it beats, from 0 to 1.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_choices, subsection
from vlmrlaif_jax.data.prompts import PROMPT_STYLES
from vlmrlaif_jax.feedback import rankers
from vlmrlaif_jax.feedback.rankers import CompareFn
from vlmrlaif_jax.feedback.terms import servers
from vlmrlaif_jax.feedback.terms.functions import Outcome
from vlmrlaif_jax.feedback.terms.sample import Sample, make_example
from vlmrlaif_jax.feedback.terms.servers import JudgeSources

RANK_KINDS = ("list", "pairs")
UNREAD = Outcome(None, "a reply of the judge about the group is no ranking")
ALONE = Outcome(
  None, "the group has one response, which the term rank compares with no other"
)


def read_rank_settings(kwargs: Mapping[str, Any], server: ConfigDict) -> ConfigDict:
  """Returns the settings of the term `rank`, after a check.

  They are the "judge" ("endpoint" or "self"), those of a server, the "kind" ("list" for
  one query per group, "pairs" for two queries per pair), the "style" of the prompts of
  pairs, and "sees_video".

  Raises:
    ValueError: A setting is unknown or wrong. The message starts with "kwargs.".
  """
  with subsection("kwargs"):
    config = servers.read_server_settings(
      kwargs, server, kind="list", style="paper", sees_video=True
    )
    check_choices(config, {"kind": RANK_KINDS, "style": PROMPT_STYLES})
    servers.check_judge(config)
  return config


def make_rank_term(
  kwargs: Mapping[str, Any], sources: JudgeSources
) -> Callable[[Sequence[Sample]], list[Outcome]]:
  """Returns a function that scores samples by their ranks within groups.

  Every process must call it.

  Args:
    kwargs: See read_rank_settings.
    sources: The judges that may be selected.
  """
  config = read_rank_settings(kwargs, sources.server)
  ask = servers.make_ask(config, sources)
  if config.kind == "list":
    compare = rankers.listwise_ranker(ask)
  else:
    compare = rankers.pairwise_ranker(ask, PROMPT_STYLES[config.style])
  return functools.partial(score_by_rank, compare=compare)


def score_by_rank(samples: Sequence[Sample], compare: CompareFn) -> list[Outcome]:
  """Returns the win rate of each response within its group.

  All responses of a group are invalid without a readable reply about them. The only
  response to a prompt is invalid, too.

  Args:
    samples: Responses. Adjacent ones with the same id are a group.
    compare: Ranks groups of one size.
  """
  groups = [list(group) for _, group in itertools.groupby(samples, lambda s: s.id)]
  outcomes: dict[int, list[Outcome]] = {}
  for size in sorted({len(group) for group in groups}):
    indices = [i for i, group in enumerate(groups) if len(group) == size]
    rates = _compute_win_rates([groups[i] for i in indices], compare)
    outcomes |= zip(indices, rates, strict=True)
  return [outcome for i in range(len(groups)) for outcome in outcomes[i]]


def _compute_win_rates(
  groups: Sequence[Sequence[Sample]], compare: CompareFn
) -> list[list[Outcome]]:
  """Returns the outcomes of groups of one size."""
  if len(groups[0]) == 1:
    return [[ALONE] for _ in groups]
  comparison = compare(
    [make_example(first) for first, *_ in groups],
    [[sample.response for sample in group] for group in groups],
  )
  rates = rankers.compute_win_rates(comparison.scores)
  return [
    [
      Outcome(float(rate)) if is_valid else UNREAD
      for rate, is_valid in zip(*rows, strict=True)
    ]
    for rows in zip(rates, comparison.valid, strict=True)
  ]
