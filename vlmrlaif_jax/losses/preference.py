"""Losses on pairs of a chosen and a rejected response."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def bradley_terry_loss(
  chosen_scores: Float[Array, "*batch"],
  rejected_scores: Float[Array, "*batch"],
  *,
  margin: float = 0.0,
) -> Float[Array, "*batch"]:
  """Computes the pairwise loss of a reward model, in nats per pair.

    -log sigmoid(chosen - rejected - margin)

  It is one term of Ouyang et al. 2022 (2203.02155), eq. 1; the paper has no margin.

  >>> print(bradley_terry_loss(jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0])))
  [0.693 2.127]

  Args:
    chosen_scores: scores of the preferred responses.
    rejected_scores: scores of the other responses.
    margin: required score difference; 0 disables it.
  """
  return -jax.nn.log_sigmoid(chosen_scores - rejected_scores - margin)


def center_penalty(
  chosen_scores: Float[Array, "*batch"],
  rejected_scores: Float[Array, "*batch"],
  mask: Bool[Array, "*batch"] | bool = True,
) -> Float[Array, ""]:
  """Computes |mean(chosen + rejected)|, which keeps scores near 0.

  VLM-RLAIF's code has this term, with weight 1e-3; the paper (2402.03746) does not.
  The penalty of a batch is not the mean of its microbatches' penalties.

  Args:
    chosen_scores: scores of the preferred responses.
    rejected_scores: scores of the other responses.
    mask: True for the pairs that are averaged.
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
  """Computes the DPO loss in nats per pair: Rafailov et al. 2023 (2305.18290), eq. 7.

    -log sigmoid(beta * (log p/p_ref of chosen - log p/p_ref of rejected))

  >>> chosen, rejected, ref = jnp.array([-3.0]), jnp.array([-8.0]), jnp.array([-5.0])
  >>> print(dpo_loss(chosen, rejected, ref, ref, beta=0.1))
  [0.474]

  Args:
    chosen_logps: log-probability in nats of each chosen response under the policy.
    rejected_logps: the same of each rejected response.
    ref_chosen_logps: the same under the frozen reference policy, without a gradient.
    ref_rejected_logps: the same of each rejected response.
    beta: strength of the implied KL penalty; 0.1 in the paper.
  """
  chosen = chosen_logps - jax.lax.stop_gradient(ref_chosen_logps)
  rejected = rejected_logps - jax.lax.stop_gradient(ref_rejected_logps)
  return -jax.nn.log_sigmoid(beta * (chosen - rejected))
