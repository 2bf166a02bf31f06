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


def centre_penalty(
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
  label_smoothing: float = 0.0,
) -> Float[Array, "*batch"]:
  """Direct preference optimisation, Rafailov et al. 2023 (2305.18290), eq. 7, in nats.

    -log sigmoid(beta * (log p/p_ref of chosen - log p/p_ref of rejected))

  Args:
    chosen_logps: log-probability of the whole response, under the policy.
    rejected_logps: likewise.
    ref_chosen_logps: under the frozen reference; no gradient flows to it.
    ref_rejected_logps: likewise.
    beta: strength of the implied KL penalty; 0.1 in the paper.
    label_smoothing: probability that a preference is the wrong way round; above 0 it
      is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences").
  """
  chosen = chosen_logps - jax.lax.stop_gradient(ref_chosen_logps)
  rejected = rejected_logps - jax.lax.stop_gradient(ref_rejected_logps)
  margin = beta * (chosen - rejected)
  right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
  return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(
  chosen_logps: Float[Array, "*batch"],
  rejected_logps: Float[Array, "*batch"],
  ref_chosen_logps: Float[Array, "*batch"],
  ref_rejected_logps: Float[Array, "*batch"],
  *,
  beta: float,
) -> Float[Array, "*batch"]:
  """Identity preference optimisation, Azar et al. 2023 (2310.12036), eq. 17.

    (log p/p_ref of chosen - log p/p_ref of rejected - 1 / (2 beta))^2

  The margin is led to a finite value, where DPO's goes on growing with certain labels.

  Args:
    chosen_logps: log-probability of the whole response, under the policy.
    rejected_logps: likewise.
    ref_chosen_logps: under the frozen reference; no gradient flows to it.
    ref_rejected_logps: likewise.
    beta: the paper's tau: the larger, the nearer to the reference.
  """
  chosen = chosen_logps - jax.lax.stop_gradient(ref_chosen_logps)
  rejected = rejected_logps - jax.lax.stop_gradient(ref_rejected_logps)
  return jnp.square(chosen - rejected - 1 / (2 * beta))


def simpo_loss(
  chosen_logps: Float[Array, "*batch"],
  rejected_logps: Float[Array, "*batch"],
  *,
  beta: float,
  margin: float,
) -> Float[Array, "*batch"]:
  """Simple preference optimisation, Meng et al. 2024 (2405.14734), eq. 6, in nats.

    -log sigmoid(beta * (log p of chosen - log p of rejected) - margin)

  There is no reference.

  Args:
    chosen_logps: the mean of a response's tokens, under the policy.
    rejected_logps: likewise.
    beta: 2.0 to 2.5 in the paper.
    margin: the paper's gamma, which the difference is to exceed; 0.5 to 1.6 there.
  """
  return -jax.nn.log_sigmoid(beta * (chosen_logps - rejected_logps) - margin)


def orpo_loss(
  chosen_logps: Float[Array, "*batch"], rejected_logps: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
  """The odds-ratio term of ORPO, Hong et al. 2024 (2403.07691), eq. 7, in nats.

    -log sigmoid(log odds of chosen - log odds of rejected),   odds = p / (1 - p)

  The paper adds 0.1 of it to the chosen response's mean -log p. There is no reference.

  Args:
    chosen_logps: the mean of a response's tokens, under the policy; below 0.
    rejected_logps: likewise.
  """
  return -jax.nn.log_sigmoid(_log_odds(chosen_logps) - _log_odds(rejected_logps))


def _log_odds(logps: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
  """log(p / (1 - p)); of a p that rounding has made 1, that of the largest below."""
  logps = jnp.minimum(logps, -jnp.finfo(logps.dtype).eps)
  return logps - jnp.log(-jnp.expm1(logps))
