"""From scores and log-probabilities to rewards, advantages and returns."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from vlmrlaif_jax.losses import advantages as shipped
from vlmrlaif_jax.losses.advantages import (
  KL_ESTIMATORS,
  compute_token_rewards,
  estimate_kl,
  estimate_reverse_kl,
)

gae = jax.jit(shipped.compute_gae, static_argnames=("gamma", "lam"))
ROWS, TIME = 3, 6
REWARDS, VALUES = jnp.asarray(
  np.random.default_rng(0).normal(size=(2, ROWS, TIME)), jnp.float32
)
ONES = jnp.ones((ROWS, TIME), bool)
# Padding on the left and right, a hole, and a response of which nothing is left.
MASK = jnp.array([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
HABIT = {"gamma": 0.9, "lam": 0.8}


def loop_gae(rewards, values, mask, *, gamma, lam):
  """GAE row by row, over the list of real tokens, in float64."""
  rewards, values, mask = (np.asarray(x) for x in (rewards, values, mask))
  advantages = np.zeros(rewards.shape)
  for row in range(len(rewards)):
    next_value = next_advantage = 0.0
    for t in reversed(np.flatnonzero(mask[row])):
      delta = rewards[row, t] + gamma * next_value - values[row, t]
      next_advantage = delta + gamma * lam * next_advantage
      next_value = values[row, t]
      advantages[row, t] = next_advantage
  return advantages, np.where(mask, advantages + values, 0)


@pytest.mark.parametrize(
  ("estimator", "expected"),
  [
    ("k1", [math.log(2), -math.log(2), 0]),
    ("k1_clamped", [math.log(2), 0, 0]),
    # r - 1 - log r, with r = p_ref / p.
    ("k3", [0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0]),
  ],
)
def test_kl_estimate_by_hand(estimator, expected):
  logps, ref_logps = jnp.log(jnp.array([[0.8, 0.4, 0.5], [0.4, 0.8, 0.5]]))
  kl = estimate_kl(logps, ref_logps, estimator=estimator)
  np.testing.assert_allclose(kl, expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimate_has_the_kl_for_its_mean(estimator):
  p, ref = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.3, 0.3, 0.4])
  exact = jnp.sum(p * jnp.log(p / ref))
  expected = jnp.sum(p * estimate_kl(jnp.log(p), jnp.log(ref), estimator=estimator))
  np.testing.assert_allclose(expected, exact, rtol=1e-5)


@pytest.mark.parametrize(
  ("estimator", "slope"), [("k1", 1.0), ("k1_clamped", 1.0), ("k3", 1 - 0.5)]
)
def test_kl_estimate_gradient_goes_to_the_policy_alone(estimator, slope):
  kl = lambda logps, ref: estimate_kl(logps, ref, estimator=estimator).sum()
  at = (jnp.log(jnp.array([0.8])), jnp.log(jnp.array([0.4])))
  to_policy, to_reference = jax.grad(kl, (0, 1))(*at)
  np.testing.assert_allclose(to_policy, [slope], rtol=1e-6)  # k3: 1 - r.
  np.testing.assert_array_equal(to_reference, [0])


@pytest.mark.parametrize("estimator", ["k1_clamped", "k3"])
def test_kl_estimate_is_never_negative(estimator):
  logps = jnp.linspace(-30.0, 0.0, 100)
  assert (estimate_kl(logps, logps[::-1], estimator=estimator) >= 0).all()


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimate_works_elementwise_on_any_axes(estimator):
  whole = estimate_kl(REWARDS[None], VALUES[None], estimator=estimator)
  row = estimate_kl(REWARDS[1], VALUES[1], estimator=estimator)
  chex.assert_trees_all_close(whole[0, 1], row, rtol=1e-6)


def test_kl_estimate_keeps_the_digits_of_a_small_k3():
  kl = estimate_kl(jnp.zeros(1), jnp.full(1, 1e-3), estimator="k3")
  np.testing.assert_allclose(kl, 0.5e-6 + 1e-9 / 6, rtol=1e-3)


@pytest.mark.parametrize(
  "kl",
  [
    lambda x: estimate_kl(-x, 0 * x, estimator="k3"),
    lambda x: estimate_reverse_kl(x, 0 * x),
  ],
)
def test_k3_continues_along_its_tangent_far_away_in_both_directions(kl):
  log_ratio = jnp.array([-1e3, -25.0, 2.0, 20.0, 25.0, 1e3])
  steepest = math.expm1(20)
  values = [1e3 - 1, 24, math.expm1(2) - 2]
  values += [steepest - 20 + steepest * x for x in (0, 5, 980)]
  slopes = [-1, -1, math.expm1(2), steepest, steepest, steepest]
  np.testing.assert_allclose(kl(log_ratio), values, rtol=1e-6)
  grad = jax.grad(lambda x: kl(x).sum())(log_ratio)
  np.testing.assert_allclose(
    grad[jnp.array([0, 1, 2, 4, 5])], np.delete(slopes, 3), rtol=1e-5
  )
  assert jnp.isfinite(grad).all()


def test_kl_estimate_refuses_an_unknown_estimator():
  message = 'must be one of "k1", "k1_clamped", "k3", not \'k2\''
  with pytest.raises(ValueError, match=message):
    estimate_kl(REWARDS, VALUES, estimator="k2")


def test_rewards_by_hand():
  mask = jnp.array([[False, True, True, False], [True, True, True, True]])
  kl = jnp.array([[9.0, 1.0, 2.0, 9.0], [0.0, 1.0, 0.0, 2.0]])
  rewards = compute_token_rewards(jnp.array([5.0, -1.0]), kl, mask, kl_coef=0.5)
  expected = [[0, -0.5, 5 - 1, 0], [0, -0.5, 0, -1 - 1]]
  np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_rewards_ignore_what_is_masked():
  kl = jnp.where(MASK, REWARDS, jnp.nan)
  rewards = compute_token_rewards(jnp.ones(ROWS), kl, MASK, kl_coef=0.1)
  assert jnp.isfinite(rewards).all()


def test_rewards_of_an_empty_response_are_zero():
  rewards = compute_token_rewards(jnp.full(ROWS, 7.0), REWARDS, MASK, kl_coef=0.1)
  np.testing.assert_array_equal(rewards[2], 0)


def test_rewards_sum_to_the_score_less_the_penalty():
  scores = jnp.array([2.0, 3.0, 4.0])
  rewards = compute_token_rewards(scores, REWARDS, MASK, kl_coef=0.1)
  expected = scores - 0.1 * jnp.sum(REWARDS, axis=-1, where=MASK)
  np.testing.assert_allclose(rewards.sum(-1)[:2], expected[:2], rtol=1e-5)


def test_rewards_with_an_open_mask_stand_at_the_last_position():
  rewards = compute_token_rewards(jnp.ones(ROWS), REWARDS * 0, ONES, kl_coef=0.1)
  np.testing.assert_array_equal(rewards, np.eye(TIME)[[-1] * ROWS])


def test_rewards_take_any_leading_axes():
  scores = jnp.array([2.0, 3.0, 4.0])
  nested = compute_token_rewards(scores[None], REWARDS[None], MASK[None], kl_coef=0.1)
  row = compute_token_rewards(scores[0], REWARDS[0], MASK[0], kl_coef=0.1)
  chex.assert_trees_all_close(nested[0, 0], row, rtol=1e-6)


def test_gae_by_hand():
  rewards, values = jnp.array([0.0, 0.0, 1.0]), jnp.array([0.5, 0.25, 0.5])
  advantages, returns = gae(rewards, values, jnp.ones(3, bool), gamma=0.5, lam=0.5)
  # delta = [0 + .5 * .25 - .5, 0 + .5 * .5 - .25, 1 - .5] = [-.375, 0, .5].
  expected = np.array([-0.375 + 0.25 * 0.125, 0.25 * 0.5, 0.5])
  np.testing.assert_allclose(advantages, expected, rtol=1e-6)
  np.testing.assert_allclose(returns, expected + [0.5, 0.25, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_a_loop(gamma, lam):
  ours = gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
  expected = loop_gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
  chex.assert_trees_all_close(ours, expected, atol=1e-5)


def test_gae_equals_rlax():
  advantages, _ = gae(REWARDS, VALUES, ONES, **HABIT)
  for row in range(ROWS):
    expected = rlax.truncated_generalized_advantage_estimation(
      REWARDS[row], jnp.full(TIME, 0.9), 0.8, jnp.append(VALUES[row], 0.0)
    )
    np.testing.assert_allclose(advantages[row], expected, atol=1e-5)


def test_gae_steps_over_what_is_masked():
  advantages, returns = gae(REWARDS, VALUES, MASK, **HABIT)
  real = MASK[0]
  dense = gae(REWARDS[0][real], VALUES[0][real], real[real], **HABIT)
  chex.assert_trees_all_close((advantages[0][real], returns[0][real]), dense, rtol=1e-6)


def test_gae_ignores_nan_that_is_masked():
  rewards, values = (jnp.where(MASK, x, jnp.nan) for x in (REWARDS, VALUES))
  chex.assert_trees_all_equal(
    gae(rewards, values, MASK, **HABIT), gae(REWARDS, VALUES, MASK, **HABIT)
  )


def test_gae_gradient_ignores_nan_that_is_masked():
  total = lambda values: gae(REWARDS, values, MASK, **HABIT)[0].sum()
  grad = jax.grad(total)(jnp.where(MASK, VALUES, jnp.nan))
  chex.assert_trees_all_equal(grad, jax.grad(total)(VALUES))


def test_gae_gradient_of_the_first_advantage_by_hand():
  first = lambda rewards: gae(rewards, VALUES[0], ONES[0], **HABIT)[0][0]
  expected = (0.9 * 0.8) ** np.arange(TIME)
  np.testing.assert_allclose(jax.grad(first)(REWARDS[0]), expected, rtol=1e-5)


def test_gae_takes_any_leading_axes():
  nested = gae(REWARDS[None], VALUES[None], MASK[None], **HABIT)
  row = gae(REWARDS[0], VALUES[0], MASK[0], **HABIT)
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[0, 0], nested), row, rtol=1e-6)


def test_gae_without_discount_does_not_care_where_the_last_reward_stands():
  # Why VLM-RLAIF's habit of rewarding the last position does no harm to it.
  values = jnp.where(MASK, VALUES, 0.0)
  score = jnp.array([3.0, 3.0, 0.0])
  at_end = compute_token_rewards(score, VALUES * 0, ONES, kl_coef=0.0)
  at_token = compute_token_rewards(score, VALUES * 0, MASK, kl_coef=0.0)
  theirs, _ = gae(at_end, values, ONES, gamma=1.0, lam=1.0)
  ours, _ = gae(at_token, values, MASK, gamma=1.0, lam=1.0)
  chex.assert_trees_all_close(theirs[MASK], ours[MASK], atol=1e-5)
