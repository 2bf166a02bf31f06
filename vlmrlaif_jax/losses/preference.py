"""Losses on pairs of responses, one of which was preferred."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def bradley_terry_loss(
  chosen_scores: Float[Array, "*batch"],
  rejected_scores: Float[Array, "*batch"],
  *,
  margin: float = 0.0,
) -> Float[Array, "*batch"]:
  """Pairwise reward-model loss, -log sigmoid(chosen - rejected - margin), in nats.

  Ouyang et al. 2022 (2203.02155), eq. 1, of one pair.
  """
  return -jax.nn.log_sigmoid(chosen_scores - rejected_scores - margin)


def center_penalty(
  chosen_scores: Float[Array, "*batch"],
  rejected_scores: Float[Array, "*batch"],
  mask: Bool[Array, "*batch"] | bool = True,
) -> Float[Array, ""]:
  """|mean(chosen + rejected)|: keeps scores near 0, where only differences count.

  A term of VLM-RLAIF's code, with weight 1e-3; not in the paper (2402.03746).
  Unlike a mean over pairs, it is not the mean of what it is of parts of a batch.

  Args:
    chosen_scores: of the preferred responses.
    rejected_scores: of the others.
    mask: the pairs that count.
  """
  return jnp.abs(jnp.mean(chosen_scores + rejected_scores, where=mask))


def dpo_loss(
  chosen_logps: Float[Array, "*batch"],
  rejected_logps: Float[Array, "*batch"],
  ref_chosen_logps: Float[Array, "*batch"],
  ref_rejected_logps: Float[Array, "*batch"],
  *,
  beta: float,
) -> Float[Array, "*batch"]:
  """Direct preference optimisation, Rafailov et al. 2023 (2305.18290), eq. 7, in nats.

    -log sigmoid(beta * (log p/p_ref of chosen - log p/p_ref of rejected))

  Args:
    chosen_logps: log-probability of the whole response, under the policy.
    rejected_logps: likewise.
    ref_chosen_logps: under the frozen reference; no gradient flows to it.
    ref_rejected_logps: likewise.
    beta: strength of the implied KL penalty; 0.1 in the paper.
  """
  chosen = chosen_logps - jax.lax.stop_gradient(ref_chosen_logps)
  rejected = rejected_logps - jax.lax.stop_gradient(ref_rejected_logps)
  return -jax.nn.log_sigmoid(beta * (chosen - rejected))
