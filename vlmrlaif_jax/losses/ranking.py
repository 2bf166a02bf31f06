"""Advantages within a group of responses to one prompt, from their ranks or scores.

Oracle-RLAIF (2510.02561) computes advantages from ranks. Its code is not public, and
reports of its equations differ, so each reported form is a function here. The
advantages of a group sum to 0 and carry no gradient. Those of reinforce_advantages sum
to 0 over the whole batch only.

Rank 0 is the best response. Tied responses share ranks: each gets the mean gain of
these ranks (McSherry & Najork 2008). Responses that are not `valid` do not count as
members of the group, and their advantage is 0.

Every function takes arrays whose last axis is the group:
  scores        scores of the oracle; functions of ranks use only their order.
  valid         True for the members of the group.
  policy_logps  log-probability of each response under the policy, in nats.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GroupScores: TypeAlias = Float[Array, "*batch group"]  # A number for each response.
GroupValid: TypeAlias = Bool[Array, "*batch group"]  # True for members of the group.
# A function from ranks to their gains.
GainFn: TypeAlias = Callable[[Float[Array, " group"]], Float[Array, " group"]]


def compute_competition_ranks(
  scores: GroupScores, valid: GroupValid
) -> Int[Array, "*batch group"]:
  """Returns the number of responses of the group that score higher.

  >>> print(compute_competition_ranks(jnp.array([5.0, 9.0, 9.0]), jnp.ones(3, bool)))
  [2 0 0]
  """
  higher = scores[..., None, :] > scores[..., :, None]
  return jnp.sum(higher & valid[..., None, :], axis=-1)


def average_tied_gains(
  scores: GroupScores, valid: GroupValid, gain_fn: GainFn
) -> GroupScores:
  """Returns gain_fn(rank) of each response, averaged over the ranks of a tie.

  >>> halves = lambda rank: 0.5**rank
  >>> print(average_tied_gains(jnp.array([9.0, 7.0, 7.0]), jnp.ones(3, bool), halves))
  [1.    0.375 0.375]
  """
  first = compute_competition_ranks(scores, valid)[..., None]
  same = scores[..., None, :] == scores[..., :, None]
  count = jnp.sum(same & valid[..., None, :], axis=-1, keepdims=True)
  ranks = jnp.arange(scores.shape[-1])
  shared = (ranks >= first) & (ranks < first + count)
  table = gain_fn(ranks.astype(jnp.float32))
  total = jnp.sum(jnp.where(shared, table, 0.0), axis=-1)
  return total / jnp.maximum(count[..., 0], 1)


# Advantages from the oracle's ranks.


def ndcg_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes GRPO_rank from the oracle's ranks: DCG(rank) - mean of the group's DCG.

    DCG(rank) = 1 / ((1 + rank) log2(2 + rank)), so that DCG(0) = 1

  These are the reported terms of Oracle-RLAIF (2510.02561), without the policy's
  ranks. In groups of five only the best response has an advantage above 0.

  >>> print(ndcg_advantages(jnp.array([9.0, 7.0, 5.0]), jnp.ones(3, bool)))
  [ 0.506 -0.179 -0.327]
  """
  return _center(average_tied_gains(scores, valid, _dcg), valid)


def ndcg_std_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Divides ndcg_advantages by the group's standard deviation, to the scale of GRPO."""
  return _divide_by_std(ndcg_advantages(scores, valid), valid, eps=1e-6)


def logdisc_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes 1 / log2(2 + rank) - mean, which decays more slowly than DCG(rank).

  The discount is that of Järvelin & Kekäläinen 2002, in base 2.
  """
  return _center(average_tied_gains(scores, valid, _discount), valid)


def linear_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes equal steps from 2 for the best to -2 for the worst: GOPO (2602.03876).

  >>> print(linear_advantages(jnp.array([9.0, 7.0, 6.0, 5.0, 5.0]), jnp.ones(5, bool)))
  [ 2.   1.   0.  -1.5 -1.5]
  """
  steps = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True) - 1, 1)
  return 4 / steps * _center(average_tied_gains(scores, valid, jnp.negative), valid)


def rank_zscore_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes zscore_advantages with -rank as the score."""
  return zscore_advantages(average_tied_gains(scores, valid, jnp.negative), valid)


# Advantages from the scores.


def zscore_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes (score - mean) / (std + 1e-4) of the group: GRPO (2402.03300), sec. 4.1.2.

  As in TRL, std divides by n - 1, and 1e-4 is added.

  >>> valid = jnp.array([True, True, True, False])
  >>> print(zscore_advantages(jnp.array([1.0, 2.0, 3.0, 9.0]), valid))
  [-1.  0.  1.  0.]
  """
  return _divide_by_std(_center(scores, valid), valid, eps=1e-4)


def centered_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes score - mean of the group: Dr. GRPO (2503.20783), section 3.2."""
  return _center(scores, valid)


def leave_one_out_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes score - mean of the group's other scores: RLOO (2402.14740), section 3.2.

  >>> print(leave_one_out_advantages(jnp.array([1.0, 2.0, 6.0]), jnp.ones(3, bool)))
  [-3.  -1.5  4.5]
  """
  count = jnp.sum(valid, axis=-1, keepdims=True)
  return _center(scores, valid) * count / jnp.maximum(count - 1, 1)


# Advantages from the scores of the whole batch: all axes are reduced.


def reinforce_advantages(scores: GroupScores, valid: GroupValid) -> GroupScores:
  """Computes (score - mean) / std over the batch: REINFORCE++ (2501.03262).

  Responses to different prompts are compared with each other, so a group of equal
  scores has an advantage too. The std divides by n - 1.

  >>> scores, valid = jnp.array([[1.0, 2.0], [3.0, 9.0]]), jnp.ones((2, 2), bool)
  >>> print(reinforce_advantages(scores, valid.at[1, 1].set(False)))
  [[-1.  0.]
   [ 1.  0.]]
  """
  each, used = scores.reshape(-1), valid.reshape(-1)
  advantages = _divide_by_std(_center(each, used), used, eps=1e-8)
  return advantages.reshape(scores.shape)


def reinforce_baseline_advantages(
  scores: GroupScores, valid: GroupValid
) -> GroupScores:
  """Computes (score - mean of the group) / std over the batch of these differences.

  It is REINFORCE++ with the group's mean as the baseline (2501.03262). The differences
  have mean 0 over the batch, as over each group. The std divides by n - 1.

  >>> scores = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]])
  >>> print(reinforce_baseline_advantages(scores, jnp.ones((2, 3), bool)))
  [[-1.118  0.     1.118]
   [-1.118  0.     1.118]]
  """
  centered = _center(scores, valid).reshape(-1)
  advantages = _divide_by_std(centered, valid.reshape(-1), eps=1e-8)
  return advantages.reshape(scores.shape)


# Advantages from the oracle's ranks and the policy's.


def ratio_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """Computes GRPO_rank as reported of Oracle-RLAIF (2510.02561): ratio - mean ratio.

    ratio = DCG(policy's rank) / DCG(oracle's rank), with penalty 1 - ratio

  It rewards agreement, not quality. The ratio is unbounded for a response that the
  policy ranks above the oracle. If the policy ranks the best response last, this
  response gets the least advantage and becomes less probable. If the policy's ranks are
  random, the expected advantage *increases* from the best response to the worst. Use it
  only for comparisons.

  >>> scores, valid = jnp.array([3.0, 2.0, 1.0]), jnp.ones(3, bool)
  >>> print(ratio_advantages(scores, valid, jnp.array([-9.0, -5.0, -1.0])))
  [-2.222 -1.389  3.611]
  """
  return _center(_compute_gain_ratio(scores, valid, policy_logps, _dcg), valid)


def bounded_ratio_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """Computes ratio_advantages with the penalty clipped to its reported range [0, 1].

  It also favors bad responses if the policy's ranks are random.
  """
  ratio = _compute_gain_ratio(scores, valid, policy_logps, _dcg)
  return _center(jnp.clip(ratio, 0.0, 1.0), valid)


def appendix_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """Computes bounded_ratio_advantages with another DCG, log2(2 + rank) / (1 + rank).

  It reproduces the numbers that are reported of the appendix of 2510.02561 for a
  response of oracle's rank 0. Its sign is wrong, as that of bounded_ratio_advantages.
  """
  ratio = _compute_gain_ratio(scores, valid, policy_logps, _appendix_dcg)
  return _center(jnp.clip(ratio, 0.0, 1.0), valid)


def lambda_advantages(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores
) -> GroupScores:
  """Computes LambdaRank's forces (Burges 2010, MSR-TR-2010-82, section 4).

    lambda_ij = sigmoid(s_j - s_i) |(g_i - g_j) (d_i - d_j)| / IDCG,  i better than j
    A_i = sum_j lambda_ij - sum_j lambda_ji

  with g = 1 / (1 + oracle's rank), d = 1 / log2(2 + policy's rank), s = policy_logps.
  The policy is the ranker. A pair has the weight of the nDCG change of swapping it in
  the policy's order. The weight decreases as the policy prefers the better response
  more.

  Args:
    scores: scores of the oracle; only their order counts.
    valid: True for the members of the group.
    policy_logps: mean log-probability per token, so that length does not count.
  """
  gain = average_tied_gains(scores, valid, lambda rank: 1 / (1 + rank))
  place = average_tied_gains(policy_logps, valid, _discount)
  ideal = gain * average_tied_gains(scores, valid, _discount)
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


def _compute_gain_ratio(
  scores: GroupScores, valid: GroupValid, policy_logps: GroupScores, gain_fn: GainFn
) -> GroupScores:
  """Returns the gain of the policy's rank divided by that of the oracle's."""
  oracle = average_tied_gains(scores, valid, gain_fn)
  policy = average_tied_gains(policy_logps, valid, gain_fn)
  return policy / jnp.where(valid, oracle, 1.0)


def _center(x: GroupScores, valid: GroupValid) -> GroupScores:
  """Subtracts the group's mean; of 1 - x, mean minus own value is the same."""
  x = jax.lax.stop_gradient(jnp.where(valid, x, 0.0))
  count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
  return jnp.where(valid, x - jnp.sum(x, axis=-1, keepdims=True) / count, 0.0)


def _divide_by_std(
  centered: GroupScores, valid: GroupValid, *, eps: float
) -> GroupScores:
  """Divides by the group's standard deviation (n - 1); a group of one stays 0."""
  count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True) - 1, 1)
  square = jnp.sum(jnp.square(centered), axis=-1, keepdims=True)
  return centered / (jnp.sqrt(square / count) + eps)


# Selection of groups.


def are_tied(scores: GroupScores, valid: GroupValid) -> Bool[Array, "*batch"]:
  """Returns whether the valid scores of each group are all equal, also if none is."""
  highest = jnp.max(scores, axis=-1, where=valid, initial=-jnp.inf)
  lowest = jnp.min(scores, axis=-1, where=valid, initial=jnp.inf)
  return highest <= lowest  # For an empty group, -inf <= inf.


def select_differing_groups(
  scores: Float[Array, "prompts group"], valid: Bool[Array, "prompts group"], count: int
) -> Int[Array, " selected"]:
  """Returns the positions of the groups whose scores have the largest std, ascending.

  It is the selection of DAPO's dynamic sampling (2503.14476, section 3.2) from a fixed
  number of groups. Of groups with equal std, the first are selected. Groups without a
  valid score come last.

  >>> scores = jnp.array([[1.0, 1.0], [0.0, 2.0], [0.0, 1.0]])
  >>> print(select_differing_groups(scores, jnp.ones((3, 2), bool), 2))
  [1 2]
  """
  # Sorted, so that the order within a group does not change the rounding.
  ordered = jnp.sort(jnp.where(valid, scores, jnp.inf), axis=-1)
  is_first = jnp.arange(scores.shape[-1]) < jnp.sum(valid, axis=-1, keepdims=True)
  # Differences from the lowest score: the std of a tie is exactly 0.
  rise = jnp.where(is_first, ordered - ordered[:, :1], 0.0)
  square = jnp.sum(jnp.square(_center(rise, is_first)), axis=-1)
  variance = square / jnp.maximum(jnp.sum(valid, axis=-1) - 1, 1)
  variance = jnp.where(is_first[:, 0], variance, -1.0)
  return jnp.sort(jnp.argsort(-variance, stable=True)[:count])
