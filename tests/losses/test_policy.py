"""PPO's clipped losses, and how far a policy has moved."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from vlmrlaif_jax.losses.policy import (
  approx_kl,
  clip_fraction,
  clipped_policy_loss,
  clipped_value_loss,
)

ROWS, TIME = 3, 5
LOGPS, OLD_LOGPS, ADVANTAGES = jnp.asarray(
  np.random.default_rng(0).normal(scale=0.5, size=(3, ROWS, TIME)), jnp.float32
)
ONES = jnp.ones((ROWS, TIME), bool)


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


def test_policy_loss_gives_no_gradient_to_what_was_sampled():
  loss = lambda *x: clipped_policy_loss(*x, clip_eps=0.2).sum()
  grads = jax.grad(loss, (1, 2))(LOGPS, OLD_LOGPS, ADVANTAGES)
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


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
def test_policy_loss_and_gradient_are_finite_far_away(distance, advantage):
  loss = lambda logps: clipped_policy_loss(
    logps, jnp.zeros(1), jnp.full(1, advantage), clip_eps=0.2
  ).sum()
  value, grad = jax.value_and_grad(loss)(jnp.full(1, distance))
  assert jnp.isfinite(value) and jnp.isfinite(grad).all()


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
