"""PPO's clipped losses, and how far a policy has moved."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from vlmrlaif_jax.losses.policy import (
  approx_kl,
  cispo_policy_loss,
  clip_fraction,
  clip_higher_policy_loss,
  clipped_policy_loss,
  clipped_value_loss,
  dual_clip_policy_loss,
  sequence_policy_loss,
  sequence_ratio,
  truncated_importance_weights,
)

ROWS, TIME = 3, 5
LOGPS, OLD_LOGPS, ADVANTAGES = jnp.asarray(
  np.random.default_rng(0).normal(scale=0.5, size=(3, ROWS, TIME)), jnp.float32
)
ONES = jnp.ones((ROWS, TIME), bool)


RANGE = dict(clip_eps_low=0.1, clip_eps_high=0.3)
MASK = jnp.arange(TIME) < jnp.array([[2], [5], [3]])
SURROGATES = {
  "clip_higher": lambda *x: clip_higher_policy_loss(*x, **RANGE),
  "dual_clip": lambda *x: dual_clip_policy_loss(*x, max_ratio=1.5, **RANGE),
  "cispo": lambda *x: cispo_policy_loss(*x, **RANGE),
  "gspo": lambda *x: sequence_policy_loss(*x, jnp.ones(x[0].shape, bool), **RANGE),
}


def loop_value_loss(values, old_values, returns, clip_eps):
  loss = np.zeros(values.shape)
  for i in np.ndindex(*values.shape):
    value, old, target = (float(x[i]) for x in (values, old_values, returns))
    clipped = min(max(value, old - clip_eps), old + clip_eps)
    loss[i] = max((value - target) ** 2, (clipped - target) ** 2) / 2
  return loss


@pytest.mark.parametrize(
  ("ratio", "advantage", "loss", "slope"),
  [
    (1.0, 2.0, -2.0, -2.0),
    (1.5, 2.0, -2.4, 0.0),  # Gone far enough: clipped at 1.2.
    (0.5, 2.0, -1.0, -1.0),  # Gone the wrong way: not clipped.
    (1.5, -2.0, 3.0, 3.0),
    (0.5, -2.0, 1.6, 0.0),
    (1.5, 0.0, 0.0, 0.0),
  ],
)
def test_policy_loss_and_slope_by_hand(ratio, advantage, loss, slope):
  of_logp = lambda logp: clipped_policy_loss(
    logp[None], jnp.zeros(1), jnp.array([advantage]), clip_eps=0.2
  )[0]
  value, grad = jax.value_and_grad(of_logp)(jnp.log(ratio))
  np.testing.assert_allclose([value, grad], [loss, slope], rtol=1e-5)


def test_policy_loss_and_gradient_equal_rlax():
  def theirs(logps):
    ratio = jnp.exp(logps - OLD_LOGPS).reshape(-1)
    return rlax.clipped_surrogate_pg_loss(ratio, ADVANTAGES.reshape(-1), 0.2)

  ours = lambda logps: jnp.mean(
    clipped_policy_loss(logps, OLD_LOGPS, ADVANTAGES, clip_eps=0.2)
  )
  chex.assert_trees_all_close(
    jax.value_and_grad(ours)(LOGPS), jax.value_and_grad(theirs)(LOGPS), atol=1e-6
  )


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_loss_of_a_token_does_not_depend_on_its_neighbours(loss):
  others = loss(LOGPS.at[0, 0].set(9.0), OLD_LOGPS, ADVANTAGES, clip_eps=0.2)
  same = loss(LOGPS, OLD_LOGPS, ADVANTAGES, clip_eps=0.2)
  keep = ONES.at[0, 0].set(False)
  chex.assert_trees_all_equal(others[keep], same[keep])


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_loss_takes_any_leading_axes(loss):
  nested = loss(LOGPS[None], OLD_LOGPS[None], ADVANTAGES[None], clip_eps=0.2)
  row = loss(LOGPS[1], OLD_LOGPS[1], ADVANTAGES[1], clip_eps=0.2)
  chex.assert_trees_all_close(nested[0, 1], row, rtol=1e-6)


@pytest.mark.parametrize("distance", [1000.0, -1000.0, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_policy_loss_and_gradient_are_finite_far_away(name, advantage, distance):
  loss = lambda logps: SURROGATES[name](logps, jnp.zeros(1), jnp.full(1, advantage))
  value, grad = jax.value_and_grad(lambda x: loss(x).sum())(jnp.full(1, distance))
  assert jnp.isfinite(value) and jnp.isfinite(grad).all()


@pytest.mark.parametrize(
  ("name", "ratio", "advantage", "loss", "slope"),
  [
    ("clip_higher", 1.25, 2.0, -2.5, -2.5),  # Up to 1.3 and down to 0.9.
    ("clip_higher", 1.5, 2.0, -2.6, 0.0),
    ("clip_higher", 0.8, -2.0, 1.8, 0.0),
    ("dual_clip", 1.4, -2.0, 2.8, 2.8),
    ("dual_clip", 2.0, -2.0, 3.0, 0.0),  # Held at 1.5.
    ("dual_clip", 2.0, 2.0, -2.6, 0.0),
    ("cispo", 2.0, 2.0, -2.6 * np.log(2.0), -2.6),  # The weight is 1.3.
    ("cispo", 0.5, -2.0, 1.8 * np.log(0.5), 1.8),  # The weight is 0.9.
    ("cispo", 1.1, -2.0, 2.2 * np.log(1.1), 2.2),
    ("gspo", 1.25, 2.0, -2.5, -2.5),
    ("gspo", 0.8, -2.0, 1.8, 0.0),
  ],
)
def test_surrogate_and_slope_by_hand(name, ratio, advantage, loss, slope):
  of_logp = lambda logp: SURROGATES[name](
    logp[None], jnp.zeros(1), jnp.array([advantage])
  )[0]
  value, grad = jax.value_and_grad(of_logp)(jnp.log(ratio))
  np.testing.assert_allclose([value, grad], [loss, slope], rtol=1e-5)


def test_sequence_ratio_is_a_geometric_mean_whose_slope_tokens_share():
  logps = jnp.log(jnp.array([1.1, 1.0, 7.0]))
  mask = jnp.array([True, True, False])
  np.testing.assert_allclose(
    sequence_ratio(logps, jnp.zeros(3), mask), 3 * [1.1**0.5], rtol=1e-6
  )
  # The mean over both tokens of -s A; each has half of the slope.
  total = lambda x: jnp.sum(
    sequence_policy_loss(x, jnp.zeros(3), 2.0 * jnp.ones(3), mask, **RANGE),
    where=mask,
  )
  value, grad = jax.value_and_grad(lambda x: total(x) / 2)(logps)
  np.testing.assert_allclose(value, -2 * 1.1**0.5, rtol=1e-6)
  np.testing.assert_allclose(grad, [-(1.1**0.5), -(1.1**0.5), 0], rtol=1e-6)


def loop_trl(name, logps, old, advantage, delta):
  """TRL's loss of a response's tokens: importance weights, then the clip."""
  log_weights = logps - old
  if name == "gspo":  # importance_sampling_level="sequence"
    log_weights = np.full(logps.shape, log_weights.sum() / max(len(logps), 1))
  weight = np.exp(log_weights)
  if name == "cispo":  # Its epsilon_high is the limit itself; there is no lower one.
    return -np.minimum(weight, 1.3) * advantage * logps
  limited = np.clip(weight, 1 - 0.1, 1 + 0.3)
  weight = np.minimum(weight, np.inf if delta is None else delta)
  return -np.minimum(weight * advantage, limited * advantage)


def loop_verl(name, logps, old, advantage):
  """verl's loss of a response's tokens."""
  losses, sequence = [], np.mean(logps - old)
  for logp, before in zip(logps, old, strict=True):
    log_ratio = sequence if name == "gspo" else np.clip(logp - before, -20, 20)
    ratio = np.exp(log_ratio)
    if name == "cispo":
      losses.append(-np.clip(ratio, 0.9, 1.3) * advantage * logp)
      continue
    loss = max(-advantage * ratio, -advantage * np.clip(ratio, 0.9, 1.3))
    if name == "dual_clip" and advantage < 0:
      loss = min(loss, -advantage * 1.5)
    losses.append(loss)
  return losses


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_equal_the_loops_of_trl_and_verl(name):
  advantages = jnp.array([[1.5], [-2.0], [-0.7]]) + 0 * LOGPS
  losses = {
    **SURROGATES,
    "gspo": lambda *x: sequence_policy_loss(*x, MASK, **RANGE),
  }
  got = losses[name](2 * LOGPS, OLD_LOGPS, advantages)
  if name == "cispo":
    lower = dict(clip_eps_low=1.0, clip_eps_high=0.3)
    unbounded = cispo_policy_loss(2 * LOGPS, OLD_LOGPS, advantages, **lower)
  for row in range(ROWS):
    real = np.asarray(MASK[row])
    logps, old = (np.asarray(x[row], float)[real] for x in (2 * LOGPS, OLD_LOGPS))
    advantage = float(advantages[row, 0])
    by_verl = loop_verl(name, logps, old, advantage)
    delta = 1.5 if name == "dual_clip" else None
    by_trl = loop_trl(name, logps, old, advantage, delta)
    np.testing.assert_allclose(got[row][real], by_verl, rtol=1e-5)
    found = unbounded if name == "cispo" else got
    np.testing.assert_allclose(found[row][real], by_trl, rtol=1e-5)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_give_no_gradient_to_what_was_sampled(name):
  grads = jax.grad(lambda *x: SURROGATES[name](*x).sum(), (1, 2))(
    LOGPS, OLD_LOGPS, ADVANTAGES
  )
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_importance_weights_are_truncated_and_constant():
  logps, sampler_logps = jnp.log(jnp.array([[0.5, 0.9, 0.2], [1.0, 0.1, 0.2]]))
  weights = truncated_importance_weights(logps, sampler_logps, max_weight=2.0)
  np.testing.assert_allclose(weights, [0.5, 2.0, 1.0], rtol=1e-6)
  total = lambda *x: truncated_importance_weights(*x, max_weight=2.0).sum()
  grads = jax.grad(total, (0, 1))(logps, sampler_logps)
  chex.assert_trees_all_equal(grads, (jnp.zeros(3), jnp.zeros(3)))


@pytest.mark.parametrize(
  ("value", "old", "target", "loss", "slope"),
  [
    (1.0, 1.0, 3.0, 2.0, -2.0),  # Not clipped: (1 - 3)^2 / 2.
    (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # Clipped to 1.2, which is worse: held.
    (2.0, 1.0, 0.0, 2.0, 2.0),  # Clipped to 1.2, which is better: pulled back.
  ],
)
def test_value_loss_and_slope_by_hand(value, old, target, loss, slope):
  of_value = lambda value: clipped_value_loss(
    value[None], jnp.array([old]), jnp.array([target]), clip_eps=0.2
  )[0]
  result = jax.value_and_grad(of_value)(jnp.array(value))
  np.testing.assert_allclose(result, [loss, slope], rtol=1e-6)


def test_value_loss_equals_a_loop():
  ours = clipped_value_loss(LOGPS, OLD_LOGPS, ADVANTAGES, clip_eps=0.2)
  expected = loop_value_loss(LOGPS, OLD_LOGPS, ADVANTAGES, 0.2)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_value_loss_without_clipping_is_half_the_squared_error():
  loss = clipped_value_loss(LOGPS, OLD_LOGPS, ADVANTAGES, clip_eps=float("inf"))
  chex.assert_trees_all_close(loss, (LOGPS - ADVANTAGES) ** 2 / 2, rtol=1e-6)


def test_value_loss_gives_no_gradient_to_what_was_collected():
  loss = lambda *x: clipped_value_loss(*x, clip_eps=0.2).sum()
  grads = jax.grad(loss, (1, 2))(LOGPS, OLD_LOGPS, ADVANTAGES)
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_value_loss_is_finite_at_large_values():
  values = jnp.array([1e15, -1e15])
  loss = clipped_value_loss(values, jnp.zeros(2), jnp.zeros(2), clip_eps=0.2)
  np.testing.assert_allclose(loss, [5e29, 5e29], rtol=1e-6)


def test_clip_fraction_counts_real_tokens_outside():
  ratio = jnp.array([1.0, 1.3, 0.7, 1.1, 99.0])
  mask = jnp.array([True, True, True, True, False])
  fraction = clip_fraction(jnp.log(ratio), jnp.zeros(5), mask, clip_eps=0.2)
  assert fraction == 0.5


def test_clip_fraction_of_the_policy_that_sampled_is_zero():
  assert clip_fraction(LOGPS, LOGPS, ONES, clip_eps=0.2) == 0


def test_approx_kl_by_hand():
  logps = jnp.array([1.0, -2.0, jnp.nan])
  kl = approx_kl(logps, jnp.zeros(3), jnp.array([True, True, False]))
  assert kl == (1 + 4) / 2 / 2


def test_approx_kl_is_close_to_the_kl_of_near_policies():
  old = jnp.array([0.5, 0.25, 0.25])  # Four draws with these frequencies:
  new = jnp.array([0.51, 0.245, 0.245])
  draws = jnp.array([0, 0, 1, 2])
  exact = jnp.sum(old * jnp.log(old / new))
  estimate = approx_kl(jnp.log(new)[draws], jnp.log(old)[draws], draws >= 0)
  np.testing.assert_allclose(estimate, exact, rtol=0.01)
