"""Token rewards with a KL penalty, and generalized advantage estimation (GAE)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Limit of k3's exponential in nats, which overflows at 88. The tangent continues it, so
# that no distance is without a gradient.
_MAX_LOG_RATIO = 20.0


def _k1(log_ratio: Float[Array, "*batch time"]) -> Float[Array, "*batch time"]:
  return -log_ratio


def _k1_clamped(log_ratio: Float[Array, "*batch time"]) -> Float[Array, "*batch time"]:
  return jnp.maximum(-log_ratio, 0.0)


def _k3(log_ratio: Float[Array, "*batch time"]) -> Float[Array, "*batch time"]:
  bounded = jnp.minimum(log_ratio, _MAX_LOG_RATIO)
  excess = jnp.maximum(log_ratio - _MAX_LOG_RATIO, 0.0)
  return jnp.expm1(bounded) - bounded + jnp.expm1(_MAX_LOG_RATIO) * excess


# Functions of log r, with r = p_ref / p.
KL_ESTIMATORS = {"k1": _k1, "k1_clamped": _k1_clamped, "k3": _k3}


def estimate_kl(
  logps: Float[Array, "*batch time"],
  ref_logps: Float[Array, "*batch time"],
  *,
  estimator: str,
) -> Float[Array, "*batch time"]:
  """Estimates KL(policy || reference) per token in nats, from the policy's tokens.

  With r = p_ref / p, as in joschu.net/blog/kl-approx.html:
    k1          -log r: unbiased, may be negative.
    k1_clamped  max(0, -log r): biased upward, as in VLM-RLAIF's code.
    k3          r - 1 - log r: unbiased, never negative. Also 2402.03300, eq. 4. Above
                log r = 20, it continues along its tangent.

  >>> logps, ref_logps = jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.0])
  >>> for name in KL_ESTIMATORS:
  ...   print(name, estimate_kl(logps, ref_logps, estimator=name))
  k1 [ 1. -1.]
  k1_clamped [1. 0.]
  k3 [0.368 0.718]

  Args:
    logps: log-probabilities in nats under the policy that sampled the tokens.
    ref_logps: the same under the reference policy, without a gradient.
    estimator: a key of KL_ESTIMATORS.

  Raises:
    ValueError: `estimator` is not in KL_ESTIMATORS.
  """
  if estimator not in KL_ESTIMATORS:
    names = ", ".join(f'"{name}"' for name in KL_ESTIMATORS)
    raise ValueError(f"estimator must be one of {names}, not {estimator!r}")
  return KL_ESTIMATORS[estimator](jax.lax.stop_gradient(ref_logps) - logps)


def estimate_reverse_kl(
  logps: Float[Array, "*batch time"], ref_logps: Float[Array, "*batch time"]
) -> Float[Array, "*batch time"]:
  """Estimates KL(reference || policy) in nats: k3 with reversed arguments.

    r - 1 - log r,  with r = p / p_ref

  It is unbiased for tokens of the reference. If the policy that sampled the tokens has
  been updated since it was the reference, there is a small bias.
  """
  return _k3(logps - jax.lax.stop_gradient(ref_logps))


def compute_token_rewards(
  scores: Float[Array, "*batch"],
  kl: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
  *,
  kl_coef: float | Float[Array, ""],
) -> Float[Array, "*batch time"]:
  """Computes the reward of each token: a KL penalty, and the score at the last token.

    r_t = -kl_coef * kl_t + (score if t is the last token else 0)

  The sum over a response is the bracket of Ouyang et al. 2022 (2203.02155), eq. 2.

  >>> kl, mask = jnp.array([[0.1, 0.2, 9.0]]), jnp.array([[True, True, False]])
  >>> print(compute_token_rewards(jnp.array([1.0]), kl, mask, kl_coef=0.5))
  [[-0.05  0.9   0.  ]]

  Args:
    scores: score of each response.
    kl: estimated KL to the reference policy at each token, in nats.
    mask: True for the tokens of the response. If it includes padding, the score is at
      the last position, as in VLM-RLAIF's code.
    kl_coef: units of score per nat.

  Returns:
    The rewards, 0 outside mask.
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
  """Computes GAE advantages: Schulman et al. 2016 (1506.02438), eq. 16.

    delta_t = r_t + gamma * v_{t+1} - v_t;   A_t = delta_t + gamma * lam * A_{t+1}

  Token t + 1 is the next token of mask. After the last one, v = A = 0.

  >>> rewards, values = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.5, 0.5, 9.0])
  >>> mask = jnp.array([True, True, False])
  >>> advantages, returns = compute_gae(rewards, values, mask, gamma=1.0, lam=0.5)
  >>> print(advantages, returns)
  [0.25 0.5  0.  ] [0.75 1.   0.  ]

  Args:
    rewards: reward of each token.
    values: value of the state before each token.
    mask: True for the tokens of the response.
    gamma: discount per token, 0 to 1.
    lam: lambda of GAE, 0 to 1: 0 has the least variance, 1 the least bias.

  Returns:
    advantages, and returns = advantages + values; both are 0 outside mask.
  """
  # Entries outside mask may be NaN.
  rewards, values = (jnp.where(mask, x, 0.0) for x in (rewards, values))

  def step(carry, token):
    next_advantage, next_value = carry
    reward, value, real = token
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
