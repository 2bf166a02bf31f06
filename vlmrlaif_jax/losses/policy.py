"""PPO's clipped losses, and metrics of the change from the sampling policy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlmrlaif_jax.losses.masked import masked_mean

# Limit in nats. exp overflows at 88, and 0 * inf is NaN. No clip_eps is this large.
_MAX_LOG_RATIO = 20.0


def clipped_policy_loss(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  advantages: Float[Array, "*batch time"],
  *,
  clip_eps: float,
) -> Float[Array, "*batch time"]:
  """Computes PPO's clipped loss: Schulman et al. 2017 (1707.06347), eq. 7, negated.

    -min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps) * A)

  >>> ratio, advantages = jnp.array([1.0, 1.5, 1.5]), jnp.array([1.0, 1.0, -1.0])
  >>> print(clipped_policy_loss(jnp.log(ratio), 0 * ratio, advantages, clip_eps=0.2))
  [-1.  -1.2  1.5]

  Args:
    logps: log-probabilities in nats under the trained policy. Only these receive a
      gradient, which is 0 where a token differs by more than 20 nats from old_logps.
    old_logps: log-probabilities under the policy that sampled the tokens.
    advantages: advantage of each token, without a gradient.
    clip_eps: maximum change of the probability ratio from 1; 0.2 in the paper.
  """
  advantages = jax.lax.stop_gradient(advantages)
  ratio = _compute_ratio(logps, jax.lax.stop_gradient(old_logps))
  clipped = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
  return -jnp.minimum(ratio * advantages, clipped * advantages)


def clipped_value_loss(
  values: Float[Array, "*batch time"],
  old_values: Float[Array, "*batch time"],
  returns: Float[Array, "*batch time"],
  *,
  clip_eps: float,
) -> Float[Array, "*batch time"]:
  """Computes half the squared error of values, or of clipped values if that is larger.

    max((v - R)^2, (clip(v, v_old - clip_eps, v_old + clip_eps) - R)^2) / 2

  The loss is from OpenAI baselines' ppo2; the PPO paper does not contain it.

  >>> values, old, returns = jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0])
  >>> print(clipped_value_loss(values, old, returns, clip_eps=0.2))
  [0.32]

  Args:
    values: values of the trained critic; only these receive a gradient.
    old_values: values of the critic when the responses were sampled.
    returns: targets of the values.
    clip_eps: maximum change from old_values, in units of reward; inf disables it.
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
  """Returns the fraction of masked-in tokens whose ratio is outside 1 +- clip_eps."""
  outside = jnp.abs(_compute_ratio(logps, old_logps) - 1) > clip_eps
  return masked_mean(outside.astype(jnp.float32), mask)


def approx_kl(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
) -> Float[Array, ""]:
  """Estimates KL(sampling policy || policy) in nats per token.

  It is the mean of half the squared log-ratio: k2 of joschu.net/blog/kl-approx.html.
  """
  return masked_mean(0.5 * jnp.square(logps - old_logps), mask)


def _compute_ratio(
  logps: Float[Array, "*batch time"], old_logps: Float[Array, "*batch time"]
) -> Float[Array, "*batch time"]:
  """Returns the probability ratio of new and old policy, within exp(+-20)."""
  return jnp.exp(jnp.clip(logps - old_logps, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
