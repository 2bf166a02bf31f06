"""From scores and log-probabilities to rewards, advantages and returns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def _k1(log_ratio: Float[Array, "*batch time"]) -> Float[Array, "*batch time"]:
  return -log_ratio


def _k1_clamped(log_ratio: Float[Array, "*batch time"]) -> Float[Array, "*batch time"]:
  return jnp.maximum(-log_ratio, 0.0)


def _k3(log_ratio: Float[Array, "*batch time"]) -> Float[Array, "*batch time"]:
  return jnp.expm1(log_ratio) - log_ratio


# Each from log r, with r = p_ref / p.
KL_ESTIMATORS = {"k1": _k1, "k1_clamped": _k1_clamped, "k3": _k3}


def estimate_kl(
  logps: Float[Array, "*batch time"],
  ref_logps: Float[Array, "*batch time"],
  *,
  estimator: str,
) -> Float[Array, "*batch time"]:
  """Per-token estimate of KL(policy || reference), from tokens of the policy.

  With r = p_ref / p, as in joschu.net/blog/kl-approx.html:
    k1          -log r: unbiased, may be negative.
    k1_clamped  max(0, -log r): biased upwards; a habit of VLM-RLAIF's code.
    k3          r - 1 - log r: unbiased, never negative.

  Args:
    logps: under the policy that sampled the tokens.
    ref_logps: constant; no gradient flows to it.
    estimator: one of the three names above.
  """
  if estimator not in KL_ESTIMATORS:
    names = ", ".join(f'"{name}"' for name in KL_ESTIMATORS)
    raise ValueError(f"estimator must be one of {names}, not {estimator!r}")
  return KL_ESTIMATORS[estimator](jax.lax.stop_gradient(ref_logps) - logps)


def compute_token_rewards(
  scores: Float[Array, "*batch"],
  kl: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
  *,
  kl_coef: float | Float[Array, ""],
) -> Float[Array, "*batch time"]:
  """-kl_coef * kl at each token of mask, plus the score at the last; 0 elsewhere.

  Args:
    scores: of each whole response.
    kl: estimated KL to the reference at each token, in nats.
    mask: the response. True over its padding too puts the score at the last
      position, as VLM-RLAIF's code does.
    kl_coef: score units per nat.
  """
  time = jnp.arange(mask.shape[-1])
  last = jnp.max(jnp.where(mask, time, -1), axis=-1, keepdims=True)
  rewards = jnp.where(time == last, scores[..., None], 0.0) - kl_coef * kl
  return jnp.where(mask, rewards, 0.0)


def compute_gae(
  rewards: Float[Array, "*batch time"],
  values: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
  *,
  gamma: float,
  lam: float,
) -> tuple[Float[Array, "*batch time"], Float[Array, "*batch time"]]:
  """Generalised advantage estimation, Schulman et al. 2016 (1506.02438), eq. 16.

    delta_t = r_t + gamma * v_{t+1} - v_t;   A_t = delta_t + gamma * lam * A_{t+1}

  over the tokens of mask alone: t + 1 is the next one of mask, wherever it
  stands, and after the last one v = A = 0.

  Returns:
    (advantages, returns), with returns = advantages + values; 0 outside mask.
  """
  # Whatever stands outside mask, even NaN, is of no consequence.
  rewards, values = (jnp.where(mask, x, 0.0) for x in (rewards, values))

  def step(later, now):
    next_advantage, next_value = later
    reward, value, real = now
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * lam * next_advantage
    carry = (
      jnp.where(real, advantage, next_advantage),
      jnp.where(real, value, next_value),
    )
    return carry, jnp.where(real, advantage, 0.0)

  time_first = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask))
  after_last = (jnp.zeros_like(rewards[..., 0]), jnp.zeros_like(values[..., 0]))
  _, advantages = jax.lax.scan(step, after_last, time_first, reverse=True)
  advantages = jnp.moveaxis(advantages, 0, -1)
  return advantages, advantages + values
