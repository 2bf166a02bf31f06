"""PPO's clipped losses, and how far a policy has moved from the one that sampled."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlmrlaif_jax.losses.masked import masked_mean

# exp overflows at 88 nats and then 0 * inf is NaN. No clip_eps reaches this far.
_FURTHEST = 20.0


def clipped_policy_loss(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  advantages: Float[Array, "*batch time"],
  *,
  clip_eps: float,
) -> Float[Array, "*batch time"]:
  """PPO's clipped surrogate, Schulman et al. 2017 (1707.06347), eq. 7, negated.

    -min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps) * A)

  Args:
    logps: under the policy being trained; the only one to get a gradient, and
      none where a token is more than 20 nats from its old_logps.
    old_logps: under the policy that sampled.
    advantages: constant; no gradient flows to them.
    clip_eps: how far the ratio of probabilities may move from 1; 0.2 in the paper.
  """
  advantages = jax.lax.stop_gradient(advantages)
  ratio = _ratio(logps, jax.lax.stop_gradient(old_logps))
  clipped = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
  return -jnp.minimum(ratio * advantages, clipped * advantages)


def clipped_value_loss(
  values: Float[Array, "*batch time"],
  old_values: Float[Array, "*batch time"],
  returns: Float[Array, "*batch time"],
  *,
  clip_eps: float,
) -> Float[Array, "*batch time"]:
  """Half the squared error, or that of the clipped value where it is larger.

    max((v - R)^2, (clip(v, v_old - clip_eps, v_old + clip_eps) - R)^2) / 2

  as in OpenAI baselines' ppo2; not in the PPO paper.

  Args:
    values: of the critic being trained; the only ones to get a gradient.
    old_values: of the critic at the time of sampling.
    returns: targets of the values.
    clip_eps: in units of value, so of the score. inf turns clipping off.
  """
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  clipped = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
  worst = jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
  return 0.5 * worst


def clip_fraction(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
  *,
  clip_eps: float,
) -> Float[Array, ""]:
  """Of the tokens of mask, the fraction whose ratio is outside 1 +- clip_eps."""
  outside = jnp.abs(_ratio(logps, old_logps) - 1) > clip_eps
  return masked_mean(outside.astype(jnp.float32), mask)


def approx_kl(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
) -> Float[Array, ""]:
  """KL of the policy that sampled to this one, per token: mean squared log-ratio / 2.

  The estimator k2 of joschu.net/blog/kl-approx.html. In nats.
  """
  return masked_mean(0.5 * jnp.square(logps - old_logps), mask)


def _ratio(
  logps: Float[Array, "*batch time"], old_logps: Float[Array, "*batch time"]
) -> Float[Array, "*batch time"]:
  """Probability under the new policy over that under the old one."""
  return jnp.exp(jnp.clip(logps - old_logps, -_FURTHEST, _FURTHEST))
