import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.rows import text_batch
from tests.methods import roles
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.feedback import rewards

SUFFIX = (11, 12, 13)
scalar_scores = jax.jit(rewards.compute_scalar_scores, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def variables():
  params, frozen = roles.roles()
  return merge_params(frozen["reward"], params["reward"])


@pytest.fixture(scope="module")
def scores(variables):
  out = scalar_scores(roles.HEADED, variables, roles.answered(), SUFFIX)
  return np.asarray(out)


def test_gap_before_the_suffix_is_invisible(variables, scores):
  batch = roles.answered()
  time = batch.tokens.shape[1] + len(SUFFIX)
  tokens = np.full((roles.ROWS, time), roles.PAD)
  for i, (row, mask) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
    compact = [*np.asarray(row)[np.asarray(mask)], *SUFFIX]
    tokens[i, -len(compact) :] = compact
  mask = jnp.asarray(tokens != roles.PAD)
  compact = text_batch(batch.video, jnp.asarray(tokens), mask, mask)
  want = jax.jit(lambda b: roles.HEADED.apply(variables, b, method="scores"))(compact)
  assert np.ptp(scores) > 0.01
  np.testing.assert_allclose(scores, want, atol=1e-5)


def test_what_stands_in_the_gap_is_of_no_consequence(variables, scores):
  batch = roles.answered()
  tokens = jnp.where(batch.mask, batch.tokens, 33)
  again = scalar_scores(roles.HEADED, variables, batch._replace(tokens=tokens), SUFFIX)
  np.testing.assert_array_equal(again, scores)


def test_suffix_is_read_but_not_learned():
  batch = roles.answered()
  longer = rewards.append_suffix(batch, SUFFIX)
  np.testing.assert_array_equal(longer.tokens[:, -3:], [SUFFIX] * roles.ROWS)
  assert longer.mask[:, -3:].all() and not longer.loss_mask[:, -3:].any()
  np.testing.assert_array_equal(longer.loss_mask[:, :-3], batch.loss_mask)


def test_a_row_without_a_finite_score_is_invalid_alone(variables):
  batch = roles.answered()
  features = roles.HEADED.apply(variables, batch.video, method="encode")
  broken = batch._replace(video=features.at[4].set(jnp.nan))
  score = jax.jit(rewards.make_model_score(roles.HEADED, SUFFIX))
  _, valid = score({"reward": variables}, broken)
  np.testing.assert_array_equal(valid, np.arange(roles.ROWS) != 4)
