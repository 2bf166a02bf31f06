"""Advantages within a group of responses to one prompt: from order, or from scores.

Oracle-RLAIF (2510.02561) gives advantages by rank. Its code is not public, and the
forms that have been reported of it differ: each one is a function here. All of them sum
to 0 over a group, and no gradient flows through any of them.

Rank 0 is the best. Ties share the ranks they stand at: each gets the mean of what those
are worth (McSherry & Najork 2008). `valid` says what is compared at all; the rest of a
group is a smaller group, and what is not valid gets 0.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GroupScores: TypeAlias = Float[Array, "*batch group"]  # A number for each response.
GroupValid: TypeAlias = Bool[Array, "*batch group"]  # The responses that count.
# What each rank of a group is worth.
WorthFn: TypeAlias = Callable[[Float[Array, " group"]], Float[Array, " group"]]


def competition_ranks(
  scores: GroupScores, valid: GroupValid
) -> Int[Array, "*batch group"]:
  """How many of the group score higher: 0 for the best, ties alike (0, 0, 2)."""
  higher = scores[..., None, :] > scores[..., :, None]
  return jnp.sum(higher & valid[..., None, :], axis=-1)


def average_worth(
  scores: GroupScores, valid: GroupValid, worth: WorthFn
) -> GroupScores:
  """worth(rank) of each; of ties, its mean over the ranks they share.

  Scores 9, 7, 7 and worths 1, .5, .3: 1, .4, .4.
  """
  first = competition_ranks(scores, valid)[..., None]
  same = scores[..., None, :] == scores[..., :, None]
  count = jnp.sum(same & valid[..., None, :], axis=-1, keepdims=True)
  ranks = jnp.arange(scores.shape[-1])
  shared = (ranks >= first) & (ranks < first + count)
  table = worth(ranks.astype(jnp.float32))
  total = jnp.sum(jnp.where(shared, table, 0.0), axis=-1)
  return total / jnp.maximum(count[..., 0], 1)


# By the order of the scores alone.


def ndcg_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """GRPO_rank by the oracle's order: mean penalty less one's own, 1 - DCG(rank).

    DCG(rank) = 1 / ((1 + rank) log2(2 + rank)), so that DCG(0) = 1

  The terms reported of Oracle-RLAIF (2510.02561), without the policy's own order. In
  groups of five only the best response has an advantage above 0.
  """
  return _centred(average_worth(scores, valid, _dcg), valid)


def ndcg_std_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """ndcg_advantages over their deviation in the group: of the size of GRPO's."""
  return _over_std(ndcg_advantages(scores, valid), valid, eps=1e-6)


def logdisc_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """1 / log2(2 + rank) less its mean: more of it goes to those behind the best."""
  return _centred(average_worth(scores, valid, _discount), valid)


def linear_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """From 2 for the best down to -2 in equal steps, as GOPO (2602.03876)."""
  steps = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True) - 1, 1)
  return 4 / steps * _centred(average_worth(scores, valid, jnp.negative), valid)


def rank_zscore_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """GRPO with minus the rank for a score."""
  return zscore_advantages(average_worth(scores, valid, jnp.negative), valid)


# By the scores.


def zscore_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """GRPO (2402.03300): (score - mean) / (deviation + 1e-4), of the group.

  The deviation divides by n - 1; it and 1e-4 are as in TRL.
  """
  return _over_std(_centred(scores, valid), valid, eps=1e-4)


def centered_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Dr. GRPO (2503.20783): score - mean of the group."""
  return _centred(scores, valid)


# By the scores' order and the policy's.


def ratio_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """GRPO_rank as reported: penalty 1 - DCG(policy's rank) / DCG(oracle's rank).

  It rewards agreement, not quality. A response that the policy finds likelier than the
  oracle does gets more, by a ratio without bound; the best one, if the policy found it
  unlikely, gets least and is made unlikelier still. Where the policy's order says
  nothing, the expected advantage *rises* from the best response to the worst. To be
  used for comparison only.

  Args:
    scores: the oracle's; only their order counts.
    valid: the responses that count.
    policy_logps: of each whole response; the likeliest has the policy's rank 0.
  """
  return _centred(_agreement(scores, valid, policy_logps, _dcg), valid)


def bounded_ratio_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """ratio_advantages with the penalty held within [0, 1], as it is said to be.

  It too favours bad responses where the policy's order says nothing.
  """
  agreement = _agreement(scores, valid, policy_logps, _dcg)
  return _centred(jnp.clip(agreement, 0.0, 1.0), valid)


def appendix_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """bounded_ratio_advantages with D(rank) = log2(2 + rank) / (1 + rank) for DCG.

  It yields the numbers that are quoted of the paper's appendix for a response of
  oracle's rank 0, and the same wrong sign.
  """
  agreement = _agreement(scores, valid, policy_logps, _appendix_dcg)
  return _centred(jnp.clip(agreement, 0.0, 1.0), valid)


def lambda_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """LambdaRank's forces (Burges 2010, MSR-TR-2010-82), with the policy as the ranker.

    lambda_ij = sigmoid(s_j - s_i) |(g_i - g_j) (d_i - d_j)| / IDCG,  i better than j
    A_i = sum_j lambda_ij - sum_j lambda_ji

  with g = 1 / (1 + oracle's rank), d = 1 / log2(2 + policy's rank), s = policy_logps.
  A pair counts by what swapping it in the policy's order would do to the nDCG, and
  less the surer the policy is of the right order.

  Args:
    scores: the oracle's; only their order counts.
    valid: the responses that count.
    policy_logps: of each whole response, per token, so that length does not count.
  """
  gain = average_worth(scores, valid, lambda rank: 1 / (1 + rank))
  place = average_worth(policy_logps, valid, _discount)
  ideal = gain * average_worth(scores, valid, _discount)
  ideal = jnp.sum(ideal, axis=-1, where=valid)[..., None, None]
  less = lambda x: x[..., :, None] - x[..., None, :]
  swap = jnp.abs(less(gain) * less(place)) / jnp.where(ideal > 0, ideal, 1.0)
  better = (less(scores) > 0) & valid[..., :, None] & valid[..., None, :]
  forces = jnp.where(better, jax.nn.sigmoid(-less(policy_logps)) * swap, 0.0)
  return jax.lax.stop_gradient(jnp.sum(forces, axis=-1) - jnp.sum(forces, axis=-2))


def _dcg(rank: Float[Array, " group"]) -> Float[Array, " group"]:
  return _discount(rank) / (1 + rank)


def _discount(rank: Float[Array, " group"]) -> Float[Array, " group"]:
  return 1 / jnp.log2(2 + rank)


def _appendix_dcg(rank: Float[Array, " group"]) -> Float[Array, " group"]:
  return jnp.log2(2 + rank) / (1 + rank)


def _agreement(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores, worth: WorthFn
) -> GroupScores:
  """Worth of the policy's rank over that of the oracle's."""
  oracle = average_worth(scores, valid, worth)
  return average_worth(policy_logps, valid, worth) / jnp.where(valid, oracle, 1.0)


def _centred(x: GroupScores, valid: GroupValid) -> GroupScores:
  """Less the mean of the group. A mean of penalties less one's own is the same."""
  x = jax.lax.stop_gradient(jnp.where(valid, x, 0.0))
  count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
  return jnp.where(valid, x - jnp.sum(x, axis=-1, keepdims=True) / count, 0.0)


def _over_std(centred: GroupScores, valid: GroupValid, *, eps: float) -> GroupScores:
  """Over the deviation of the group, with n - 1 for n; a group of one stays at 0."""
  count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True) - 1, 1)
  square = jnp.sum(jnp.square(centred), axis=-1, keepdims=True)
  return centred / (jnp.sqrt(square / count) + eps)
