import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.rows import text_batch
from tests.methods import roles
from vlmrlaif_jax.core import types
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


def ended():
  """Row 0 ends, row 1 does not; in row 2 the end's id stands in the prompt alone."""
  batch = roles.answered()
  tokens = np.array(batch.tokens)
  tokens[0, roles.START] = roles.EOS
  tokens[2, roles.START - 1] = roles.EOS
  tokens[3, -1] = roles.EOS  # After its response, where nothing counts.
  assert not batch.loss_mask[3, -1]
  return batch._replace(tokens=jnp.asarray(tokens))


def test_stop_penalty_is_for_a_response_without_an_end():
  batch, other = ended(), 61
  got = rewards.compute_stop_penalty(batch, (roles.EOS,), penalty=-8.0)
  np.testing.assert_array_equal(got, [0, -8, -8, -8, -8, -8])
  tokens = batch.tokens.at[4, roles.START].set(other)
  batch = batch._replace(tokens=tokens)
  got = rewards.compute_stop_penalty(batch, (roles.EOS, other), penalty=-8.0)
  np.testing.assert_array_equal(got, [0, -8, -8, -8, 0, -8])


def test_length_bonus_counts_response_tokens():
  batch = roles.answered()
  lengths = np.asarray(batch.loss_mask).sum(axis=1)
  got = rewards.compute_length_bonus(batch, coef=-10.0, max_response_len=roles.NEW)
  np.testing.assert_allclose(got, -10 * lengths / roles.NEW, rtol=1e-6)


def make_score():
  return rewards.make_reward_fn(
    roles.HEADED, suffix=SUFFIX, stops=(roles.EOS,), penalty=-8.0, length_coef=-10.0,
    max_response_len=roles.NEW,
  )  # fmt: skip


def test_reward_adds_the_rules_to_the_models_score(variables):
  batch = ended()
  got, valid = jax.jit(make_score())({"reward": variables}, batch)
  want = np.asarray(scalar_scores(roles.HEADED, variables, batch, SUFFIX))
  want = want + [0, -8, -8, -8, -8, -8]
  want = want - 10 * np.asarray(batch.loss_mask).sum(axis=1) / roles.NEW
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert valid.all()


def test_terms_add_up_to_the_score():
  batch = ended()
  scores = np.array([1.0, -2.5, 0.5, 8.0, -1.0, 3.0], np.float32)
  parts = rewards.split_reward_terms(
    scores,
    np.asarray(batch.loss_mask).sum(axis=1),
    np.asarray(types.has_stop(batch, (roles.EOS,))),
    penalty=-8.0,
    length_coef=-10.0,
    max_response_len=roles.NEW,
  )
  assert list(parts) == ["reward model", "no end", "length"]
  np.testing.assert_allclose(sum(parts.values()), scores, rtol=1e-6)
  np.testing.assert_array_equal(parts["no end"], [0, -8, -8, -8, -8, -8])
  lengths = np.asarray(batch.loss_mask).sum(axis=1)
  np.testing.assert_allclose(parts["length"], -10 * lengths / roles.NEW)


def test_rules_that_are_off_are_no_terms():
  zeros = np.zeros(2)
  parts = rewards.split_reward_terms(
    zeros,
    zeros.astype(int),
    zeros > 0,
    penalty=0.0,
    length_coef=0.0,
    max_response_len=9,
  )
  assert list(parts) == ["reward model"]


def test_a_row_without_a_finite_score_is_invalid_alone(variables):
  batch = roles.answered()
  features = roles.HEADED.apply(variables, batch.video, method="encode")
  broken = batch._replace(video=features.at[4].set(jnp.nan))
  _, valid = jax.jit(make_score())({"reward": variables}, broken)
  np.testing.assert_array_equal(valid, np.arange(roles.ROWS) != 4)
