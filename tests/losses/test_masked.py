"""Reductions over the real entries of a padded array."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmrlaif_jax.losses.masked import masked_mean, masked_whiten, row_mean

X = jnp.array([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
MASK = jnp.array([[True, True, False], [True, False, False]])
NONE = jnp.zeros_like(MASK)
WITH_NAN = jnp.where(MASK, X, jnp.nan)


def test_masked_mean_is_over_all_real_entries():
  assert masked_mean(X, MASK) == 3.0  # (1 + 2 + 6) / 3, not a mean of row means.


def test_row_mean_is_of_each_row():
  np.testing.assert_array_equal(row_mean(X, MASK), [1.5, 6.0])


@pytest.mark.parametrize("reduce", [masked_mean, row_mean])
def test_mean_of_nothing_is_zero(reduce):
  np.testing.assert_array_equal(reduce(X, NONE), np.zeros_like(reduce(X, MASK)))


@pytest.mark.parametrize("reduce", [masked_mean, row_mean])
def test_mean_ignores_nan_that_is_masked(reduce):
  chex.assert_trees_all_equal(reduce(WITH_NAN, MASK), reduce(X, MASK))


@pytest.mark.parametrize("reduce", [masked_mean, row_mean])
def test_mean_gradient_is_one_over_the_count(reduce):
  grad = jax.grad(lambda x: jnp.sum(reduce(x, MASK)))(WITH_NAN)
  counts = MASK.sum() if reduce is masked_mean else MASK.sum(-1, keepdims=True)
  chex.assert_trees_all_close(grad, MASK / counts, rtol=1e-6)


def test_row_mean_takes_any_leading_axes():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
  mask = x > 0
  row = row_mean(x[1, 2], mask[1, 2])
  chex.assert_trees_all_close(row_mean(x, mask)[1, 2], row, rtol=1e-6)


def test_masked_mean_sums_bfloat16_in_float32():
  x = jnp.ones((1, 1000), jnp.bfloat16)  # bfloat16 cannot count beyond 256.
  assert masked_mean(x, x > 0) == 1.0


def test_whiten_equals_numpy_over_the_real_entries():
  real = np.asarray(X)[np.asarray(MASK)]
  expected = np.zeros(X.shape)
  expected[np.asarray(MASK)] = (real - real.mean()) / (real.std() + 1e-8)
  np.testing.assert_allclose(masked_whiten(X, MASK), expected, rtol=1e-6)


def test_whiten_puts_the_mean_back_when_asked():
  shifted = masked_whiten(X, MASK, shift_mean=False)
  np.testing.assert_allclose(shifted[MASK], masked_whiten(X, MASK)[MASK] + 3, rtol=1e-6)


def test_whiten_is_zero_outside_the_mask():
  assert not masked_whiten(X, MASK, shift_mean=False)[~MASK].any()


def test_whiten_ignores_nan_that_is_masked():
  chex.assert_trees_all_equal(masked_whiten(WITH_NAN, MASK), masked_whiten(X, MASK))


def test_whiten_gradient_ignores_nan_that_is_masked():
  square = lambda x: jnp.sum(masked_whiten(x, MASK) ** 3)
  chex.assert_trees_all_equal(jax.grad(square)(WITH_NAN), jax.grad(square)(X))


def test_whiten_gradient_is_that_of_numpy_style_whitening():
  x = jnp.array([0.5, -1.0, 2.0, 0.25])
  plain = lambda x: jnp.sum(((x - x.mean()) / (x.std() + 1e-8)) ** 3)
  ours = lambda x: jnp.sum(masked_whiten(x, jnp.ones(4, bool)) ** 3)
  chex.assert_trees_all_close(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-5)


@pytest.mark.parametrize("mask", [NONE, NONE.at[0, 0].set(True)], ids=["none", "one"])
def test_whiten_gradient_is_finite_without_spread(mask):
  grad = jax.grad(lambda x: jnp.sum(masked_whiten(x, mask) ** 2))(X)
  assert jnp.isfinite(grad).all()


def test_whiten_of_equal_values_is_zero():
  np.testing.assert_array_equal(masked_whiten(jnp.full((2, 3), 7.0), MASK), 0)


def test_whiten_has_one_mean_over_all_leading_axes():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
  flat = masked_whiten(x.reshape(-1), (x > -1).reshape(-1))
  chex.assert_trees_all_close(masked_whiten(x, x > -1).reshape(-1), flat, rtol=1e-5)
