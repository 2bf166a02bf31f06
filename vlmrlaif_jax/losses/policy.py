"""Policy losses, PPO's value loss, and metrics of a policy's change."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlmrlaif_jax.losses.masked import masked_mean, row_mean

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
  return clip_higher_policy_loss(
    logps, old_logps, advantages, clip_eps_low=clip_eps, clip_eps_high=clip_eps
  )


def clip_higher_policy_loss(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  advantages: Float[Array, "*batch time"],
  *,
  clip_eps_low: float,
  clip_eps_high: float,
) -> Float[Array, "*batch time"]:
  """Computes clipped_policy_loss with two limits: DAPO (2503.14476), eq. 8, negated.

    -min(ratio * A, clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) * A)

  Args:
    logps: see clipped_policy_loss.
    old_logps: see clipped_policy_loss.
    advantages: see clipped_policy_loss.
    clip_eps_low: maximum decrease of the ratio from 1; 0.2 in the paper.
    clip_eps_high: maximum increase of the ratio from 1; 0.28 in the paper.
  """
  ratio = token_ratio(logps, old_logps)
  return _clip_objective(ratio, advantages, clip_eps_low, clip_eps_high)


def dual_clip_policy_loss(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  advantages: Float[Array, "*batch time"],
  *,
  clip_eps_low: float,
  clip_eps_high: float,
  max_ratio: float,
) -> Float[Array, "*batch time"]:
  """Computes dual-clip PPO: Ye et al. 2020 (1912.09729), negated.

    min(clip_higher_policy_loss, -max_ratio * A)  where A < 0

  Plain PPO does not limit the ratio of a token with a negative advantage.

  Args:
    logps: see clipped_policy_loss.
    old_logps: see clipped_policy_loss.
    advantages: see clipped_policy_loss.
    clip_eps_low: maximum decrease of the ratio from 1.
    clip_eps_high: maximum increase of the ratio from 1.
    max_ratio: the paper's c, above 1: the ratio from which a token with a negative
      advantage has no gradient. 3 in the paper.
  """
  limits = dict(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high)
  losses = clip_higher_policy_loss(logps, old_logps, advantages, **limits)
  highest = -max_ratio * jax.lax.stop_gradient(advantages)
  return jnp.where(advantages < 0, jnp.minimum(losses, highest), losses)


def cispo_policy_loss(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  advantages: Float[Array, "*batch time"],
  *,
  clip_eps_low: float,
  clip_eps_high: float,
) -> Float[Array, "*batch time"]:
  """Computes CISPO's loss: MiniMax-M1 (2506.13585), eq. 4 and 5, negated.

    -stop_gradient(clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)) * A * logp

  Every token keeps a gradient, also where the ratio is clipped.

  Args:
    logps: see clipped_policy_loss.
    old_logps: see clipped_policy_loss.
    advantages: see clipped_policy_loss.
    clip_eps_low: maximum decrease of the weight from 1. 1 disables it, as in the paper.
    clip_eps_high: maximum increase of the weight from 1.
  """
  old_logps, advantages = jax.lax.stop_gradient((old_logps, advantages))
  log_ratio = _bound_log_ratio(logps - old_logps)
  weight = jnp.clip(jnp.exp(log_ratio), 1 - clip_eps_low, 1 + clip_eps_high)
  # The bounded logps are finite, so that an advantage of 0 gives a loss of 0.
  return -jax.lax.stop_gradient(weight) * advantages * (old_logps + log_ratio)


def sequence_policy_loss(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  advantages: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
  *,
  clip_eps_low: float,
  clip_eps_high: float,
) -> Float[Array, "*batch time"]:
  """Computes GSPO's loss at each token: Zheng et al. 2025 (2507.18071), eq. 5, negated.

    -min(s * A, clip(s, 1 - clip_eps_low, 1 + clip_eps_high) * A),  s = sequence_ratio

  It is the same at all tokens of a response, so its mean over them is the paper's.

  Args:
    logps: see clipped_policy_loss.
    old_logps: see clipped_policy_loss.
    advantages: see clipped_policy_loss.
    mask: True for the tokens of the response.
    clip_eps_low: maximum decrease of s from 1; 3e-4 in the paper.
    clip_eps_high: maximum increase of s from 1; 4e-4 in the paper.
  """
  ratio = sequence_ratio(logps, old_logps, mask)
  return _clip_objective(ratio, advantages, clip_eps_low, clip_eps_high)


def token_ratio(
  logps: Float[Array, "*batch time"], old_logps: Float[Array, "*batch time"]
) -> Float[Array, "*batch time"]:
  """Computes the probability ratio of each token, within exp(+-20)."""
  return jnp.exp(_bound_log_ratio(logps - jax.lax.stop_gradient(old_logps)))


def sequence_ratio(
  logps: Float[Array, "*batch time"],
  old_logps: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
) -> Float[Array, "*batch time"]:
  """Computes the geometric mean of a response's token ratios, at each of its tokens.

    s = (p(response) / p_old(response))^(1 / length): GSPO (2507.18071), eq. 7

  >>> ratio, mask = jnp.array([2.0, 8.0, 9.0]), jnp.array([True, True, False])
  >>> print(sequence_ratio(jnp.log(ratio), jnp.zeros(3), mask))
  [4. 4. 4.]
  """
  log_ratio = row_mean(logps - jax.lax.stop_gradient(old_logps), mask)
  ratio = jnp.exp(_bound_log_ratio(log_ratio))
  return jnp.broadcast_to(ratio[..., None], logps.shape)


def truncated_importance_weights(
  logps: Float[Array, "*batch time"],
  sampler_logps: Float[Array, "*batch time"],
  *,
  max_weight: float,
) -> Float[Array, "*batch time"]:
  """Computes min(p / p_sampler, max_weight) of each token, without a gradient.

  Truncated importance sampling: Ionides 2008, "Truncated Importance Sampling",
  10.1198/106186008X320456. It corrects the policy loss of tokens whose sampler computes
  other probabilities than the trainer from the same weights.

  >>> logps = jnp.log(jnp.array([0.5, 0.9]))
  >>> sampler_logps = jnp.log(jnp.array([1.0, 0.1]))
  >>> print(truncated_importance_weights(logps, sampler_logps, max_weight=2.0))
  [0.5 2. ]

  Args:
    logps: log-probabilities in nats by the trainer, before the update.
    sampler_logps: log-probabilities that the sampler recorded.
    max_weight: maximum of a weight.
  """
  ratio = jax.lax.stop_gradient(token_ratio(logps, sampler_logps))
  return jnp.minimum(ratio, max_weight)


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
  outside = jnp.abs(token_ratio(logps, old_logps) - 1) > clip_eps
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


def _clip_objective(
  ratio: Float[Array, "*batch time"],
  advantages: Float[Array, "*batch time"],
  clip_eps_low: float,
  clip_eps_high: float,
) -> Float[Array, "*batch time"]:
  """Returns -min(ratio * A, clip(ratio) * A)."""
  advantages = jax.lax.stop_gradient(advantages)
  clipped = jnp.clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)
  return -jnp.minimum(ratio * advantages, clipped * advantages)


def _bound_log_ratio(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
  return jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
