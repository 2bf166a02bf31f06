"""What is left to choose from, and how often each token is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmrlaif_jax.sampling.token_sampling import (
  inverse_cdf_sample,
  sample_token,
  truncate_logits,
)


def support(logits, **settings):
  """Which tokens are left, of likelihoods given as probabilities."""
  cut = truncate_logits(jnp.log(jnp.array(logits)), **settings)
  return np.flatnonzero(np.isfinite(cut)).tolist()


PROBS = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
  "top_k, left", [(0, [0, 1, 2, 3, 4]), (1, [1]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_likeliest(top_k, left):
  assert support(PROBS, top_p=1.0, top_k=top_k) == left


@pytest.mark.parametrize(
  "top_p, left", [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.8, [1, 3, 4])]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, left):
  assert support(PROBS, top_p=top_p, top_k=0) == left


def test_top_p_speaks_of_what_top_k_has_left():
  # Of 0.4 and 0.3 alone, the first has 0.57.
  assert support(PROBS, top_p=0.56, top_k=2) == [1]
  assert support(PROBS, top_p=0.56, top_k=0) == [1, 3]


def test_tokens_are_sampled_by_their_tempered_probability():
  logits = jnp.broadcast_to(jnp.log(jnp.array(PROBS)), (20_000, 5))
  keys = jax.random.split(jax.random.key(0), 20_000)
  tokens = sample_token(keys, logits, temperature=0.5)
  want = np.square(PROBS) / np.square(PROBS).sum()
  np.testing.assert_allclose(np.bincount(tokens) / 20_000, want, atol=0.015)


@pytest.mark.parametrize("vocab", [1, 2, 9, 50, 1000])
def test_shares_fall_on_the_token_up_to_which_they_lie(vocab):
  weights = np.random.default_rng(vocab).integers(0, 5, vocab) * 1.0
  weights[vocab // 2] = 3.0
  total = int(weights.sum())
  share = (np.arange(total) + 0.5) / total  # In the middle of each unit of weight.
  rows = jnp.broadcast_to(jnp.array(weights), (total, vocab))
  want = np.repeat(np.arange(vocab), weights.astype(int))
  np.testing.assert_array_equal(inverse_cdf_sample(rows, jnp.array(share)), want)


def test_what_has_no_weight_is_not_chosen_even_at_the_ends():
  weights = jax.random.uniform(jax.random.key(0), (64, 30_000))
  weights = weights.at[:, :100].set(0).at[:, 20_000:].set(0)
  for share in (0.0, np.nextafter(np.float32(1), np.float32(0))):
    tokens = np.asarray(inverse_cdf_sample(weights, jnp.full(64, share)))
    assert tokens.min() >= 100 and tokens.max() < 20_000
