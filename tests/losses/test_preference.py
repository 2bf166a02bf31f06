"""Losses on pairs of responses, one of which was preferred."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlmrlaif_jax.losses.preference import (
  bradley_terry_loss,
  center_penalty,
  dpo_loss,
)

FOUR = tuple(jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32))
CHOSEN, REJECTED = FOUR[:2]


def softplus(x):
  return math.log1p(math.exp(x))


def test_bradley_terry_by_hand():
  loss = bradley_terry_loss(jnp.array([1.0, 0.0, 2.0]), jnp.array([1.0, 2.0, 0.0]))
  np.testing.assert_allclose(loss, [math.log(2), softplus(2), softplus(-2)], rtol=1e-6)


def test_bradley_terry_equals_the_cross_entropy_of_the_right_label():
  expected = optax.sigmoid_binary_cross_entropy(CHOSEN - REJECTED, jnp.ones(6))
  chex.assert_trees_all_close(bradley_terry_loss(CHOSEN, REJECTED), expected, rtol=1e-6)


def test_bradley_terry_gradient_is_how_wrong_it_was():
  loss = lambda *scores: bradley_terry_loss(*scores).sum()
  grads = jax.grad(loss, (0, 1))(CHOSEN, REJECTED)
  wrong = jax.nn.sigmoid(REJECTED - CHOSEN)
  chex.assert_trees_all_close(grads, (-wrong, wrong), rtol=1e-5)


def test_bradley_terry_margin_is_asked_of_the_difference():
  with_margin = bradley_terry_loss(CHOSEN, REJECTED, margin=0.5)
  shifted = bradley_terry_loss(CHOSEN - 0.5, REJECTED)
  chex.assert_trees_all_close(with_margin, shifted, rtol=1e-5)


def test_bradley_terry_is_per_pair_on_any_leading_axes():
  nested = bradley_terry_loss(CHOSEN.reshape(2, 3), REJECTED.reshape(2, 3))
  pair = bradley_terry_loss(CHOSEN[5], REJECTED[5])
  chex.assert_trees_all_close(nested[1, 2], pair, rtol=1e-6)


@pytest.mark.parametrize(("gap", "loss", "slope"), [(1e4, 0, 0), (-1e4, 1e4, -1)])
def test_bradley_terry_is_exact_at_extremes(gap, loss, slope):
  result = jax.value_and_grad(bradley_terry_loss)(jnp.array(gap), jnp.array(0.0))
  np.testing.assert_array_equal(result, [loss, slope])


def test_centre_penalty_by_hand():
  # The sums of the pairs are 3 and -5: their mean is -1.
  penalty = center_penalty(jnp.array([1.0, -4.0]), jnp.array([2.0, -1.0]))
  assert penalty == 1.0


def test_centre_penalty_gradient_pushes_all_scores_alike():
  grads = jax.grad(center_penalty, (0, 1))(CHOSEN - 9, REJECTED)
  chex.assert_trees_all_close(grads, (jnp.full(6, -1 / 6),) * 2, rtol=1e-6)


def test_centre_penalty_leaves_differences_alone():
  by = FOUR[2]
  chex.assert_trees_all_close(
    center_penalty(CHOSEN + by, REJECTED - by),
    center_penalty(CHOSEN, REJECTED),
    rtol=1e-5,
  )


def test_centre_penalty_is_one_number_over_any_leading_axes():
  nested = center_penalty(CHOSEN.reshape(2, 3), REJECTED.reshape(2, 3))
  chex.assert_trees_all_close(nested, center_penalty(CHOSEN, REJECTED), rtol=1e-5)


def test_centre_penalty_gradient_is_finite_at_the_centre():
  grad = jax.grad(center_penalty)(jnp.array([1.0]), jnp.array([-1.0]))
  assert abs(grad) <= 1


def test_dpo_by_hand():
  logps = [jnp.array([x]) for x in (-1.0, -2.0, -3.0, -1.5)]
  # beta * ((-1 + 3) - (-2 + 1.5)) = 0.1 * 2.5
  np.testing.assert_allclose(dpo_loss(*logps, beta=0.1), [softplus(-0.25)], rtol=1e-6)


def test_dpo_is_bradley_terry_of_implied_rewards():
  chosen, rejected, ref_chosen, ref_rejected = FOUR
  rewards = 0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected)
  expected = bradley_terry_loss(*rewards)
  chex.assert_trees_all_close(dpo_loss(*FOUR, beta=0.3), expected, rtol=1e-5)


def test_dpo_of_the_reference_itself_is_log_two():
  loss = dpo_loss(CHOSEN, REJECTED, CHOSEN, REJECTED, beta=0.1)
  np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)


def test_dpo_gradient_goes_to_the_policy_alone():
  loss = lambda *logps: dpo_loss(*logps, beta=0.3).sum()
  grads = jax.grad(loss, (0, 1, 2, 3))(*FOUR)
  chosen, rejected, ref_chosen, ref_rejected = FOUR
  margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
  slope = 0.3 * jax.nn.sigmoid(-margin)
  expected = (-slope, slope, jnp.zeros(6), jnp.zeros(6))
  chex.assert_trees_all_close(grads, expected, rtol=1e-5)


def test_dpo_is_per_pair_on_any_leading_axes():
  nested = dpo_loss(*(x.reshape(2, 3) for x in FOUR), beta=0.3)
  pair = dpo_loss(*(x[5] for x in FOUR), beta=0.3)
  chex.assert_trees_all_close(nested[1, 2], pair, rtol=1e-6)


@pytest.mark.parametrize(("gap", "loss", "slope"), [(1e5, 0, 0), (-1e5, 1e4, -0.1)])
def test_dpo_is_exact_at_extremes(gap, loss, slope):
  zero = jnp.array(0.0)
  result = jax.value_and_grad(dpo_loss)(jnp.array(gap), zero, zero, zero, beta=0.1)
  np.testing.assert_allclose(result, [loss, slope], rtol=1e-6)
