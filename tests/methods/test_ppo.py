import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.whole_logits import token_logps
from tests.methods import roles
from vlmrlaif_jax.core.types import Rollout, merge_params
from vlmrlaif_jax.methods import ppo
from vlmrlaif_jax.sampling.generate import SampledResponses, generate

KEY = jax.random.key(3)
SAMPLING = dict(max_new=roles.NEW, stops=(roles.EOS,), pad=roles.PAD, vocab=roles.VOCAB)
PLAIN = dict(gamma=1.0, lam=1.0, whiten_advantages=False)


def made(**settings):
  config = ppo.default_config()
  config.update({"kl_coef": 0.1, **settings})
  return ppo.make(config, roles.PARTS._replace(score=roles.score_all), **SAMPLING)


@functools.cache
def masked(kl_coef=0.0):
  return made(**PLAIN, temperature=0.7, top_p=0.9, kl_coef=kl_coef)


@functools.cache
def padded():
  """With the reference's habits; lam=0 shows where the score is put."""
  settings = {**PLAIN, "lam": 0.0, "mask_padding": False, "reward_scale": 10.0}
  settings["kl_coef"] = 0.0
  return made(**settings)


def collected(method):
  """(rollout, info), in NumPy."""
  params, frozen = roles.roles()
  out = method.collect(KEY, params, frozen, roles.prompts())
  return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def without_kl():
  return collected(masked())


@pytest.fixture(scope="module")
def with_kl():
  return collected(masked(0.3))


@pytest.fixture(scope="module")
def with_padding():
  return collected(padded())


def loss_at_first(method, rollout):
  params, frozen = roles.roles()
  return jax.jit(method.loss)(params, frozen, jax.tree.map(jnp.asarray, rollout))


def last_token(mask):
  return np.array([np.flatnonzero(row)[-1] for row in mask])


def test_responses_end_at_different_places(without_kl, with_padding):
  for rollout, _ in (without_kl, with_padding):
    ends = last_token(rollout.batch.loss_mask)
    assert len(set(ends)) > 2 and min(ends) < rollout.batch.tokens.shape[1] - 1


def test_ratio_is_one_at_the_first_update(without_kl):
  metrics = loss_at_first(masked(), without_kl[0]).metrics
  assert metrics["clip_fraction"] == 0
  assert metrics["approx_kl"] < 1e-10


def test_old_logps_are_those_of_the_sampler(without_kl):
  rollout, _ = without_kl
  params, frozen = roles.roles()
  sample = functools.partial(
    generate, roles.MODEL, **SAMPLING, temperature=0.7, top_p=0.9
  )
  sampled = jax.jit(sample)(
    merge_params(frozen["policy"], params["policy"]), roles.prompts(), KEY
  )
  np.testing.assert_array_equal(sampled.batch.tokens, rollout.batch.tokens)
  np.testing.assert_allclose(rollout.old_logps, sampled.logps, atol=1e-5)
  assert np.abs(rollout.old_logps).sum() > 1


def test_ref_logps_are_of_the_frozen_reference(without_kl):
  rollout, _ = without_kl
  _, frozen = roles.roles()
  batch = jax.tree.map(jnp.asarray, rollout.batch)
  logits = jax.jit(roles.MODEL.apply)(frozen["ref"], batch)
  want = np.where(batch.loss_mask, token_logps(logits / 0.7, batch.tokens), 0)
  np.testing.assert_allclose(rollout.ref_logps, want, atol=1e-5)
  assert np.abs(rollout.ref_logps - rollout.old_logps).max() > 0.01


def test_a_value_is_read_before_its_token(without_kl):
  rollout, _ = without_kl
  params, frozen = roles.roles()
  critic = merge_params(frozen["critic"], params["critic"])
  batch = jax.tree.map(jnp.asarray, rollout.batch)
  scalars = np.asarray(roles.HEADED.apply(critic, batch, method="scalars"))
  mask = rollout.batch.loss_mask
  for row, t in zip(*np.nonzero(mask), strict=True):
    np.testing.assert_allclose(
      rollout.old_values[row, t], scalars[row, t - 1], atol=1e-5
    )


def test_advantage_is_score_minus_value_without_kl(without_kl):
  rollout, info = without_kl
  mask = rollout.batch.loss_mask
  want = np.where(mask, info["scores"][:, None] - rollout.old_values, 0)
  np.testing.assert_allclose(rollout.advantages, want, atol=1e-5)
  returns = np.where(mask, info["scores"][:, None], 0)
  np.testing.assert_allclose(np.where(mask, rollout.returns, 0), returns, atol=1e-5)


def test_kl_is_paid_for_at_each_token(with_kl):
  rollout, info = with_kl
  kl = rollout.old_logps - rollout.ref_logps  # k1
  mask = rollout.batch.loss_mask
  for row, t in zip(*np.nonzero(mask), strict=True):
    rest = info["scores"][row] - 0.3 * kl[row, t:][mask[row, t:]].sum()
    want = rest - rollout.old_values[row, t]
    np.testing.assert_allclose(rollout.advantages[row, t], want, atol=1e-5)


def test_reference_puts_the_score_at_the_last_position(with_padding):
  rollout, info = with_padding
  values = rollout.old_values
  want = np.zeros_like(rollout.advantages)
  last = want.shape[1] - 1
  for row in range(roles.ROWS):
    for t in range(roles.START, last + 1):
      later = 10 * info["scores"][row] if t == last else values[row, t + 1]
      want[row, t] = later - values[row, t]
  np.testing.assert_allclose(rollout.advantages, want, atol=1e-5)


def test_reference_takes_losses_over_padding_too(with_padding):
  rollout, _ = with_padding
  loss = loss_at_first(padded(), rollout)
  window = slice(roles.START, None)
  advantages = rollout.advantages[:, window]
  error = rollout.returns[:, window] - rollout.old_values[:, window]
  assert loss.weight == roles.ROWS * roles.NEW
  np.testing.assert_allclose(
    loss.metrics["policy_loss"], -advantages.mean(), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    loss.metrics["value_loss"], 0.5 * np.square(error).mean(), rtol=1e-4
  )


def test_ours_takes_losses_over_tokens_alone(without_kl):
  rollout, _ = without_kl
  loss, mask = loss_at_first(masked(), rollout), rollout.batch.loss_mask
  error = (rollout.returns - rollout.old_values)[mask]
  assert loss.weight == mask.sum() < roles.ROWS * roles.NEW
  np.testing.assert_allclose(
    loss.metrics["policy_loss"], -rollout.advantages[mask].mean(), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    loss.metrics["value_loss"], 0.5 * np.square(error).mean(), rtol=1e-4
  )


def test_tokens_weigh_what_the_trainer_computes_against_the_sampler(without_kl):
  rollout, _ = without_kl
  config = ppo.default_config()
  config.update(kl_coef=0.0, temperature=0.7, tis_max=1.25, **PLAIN)
  # A sampler that is off by a factor, which differs from token to token.
  mask = rollout.batch.loss_mask
  gap = np.where(mask, np.random.default_rng(0).normal(0, 0.5, mask.shape), 0.0)
  sampled = SampledResponses(
    jax.tree.map(jnp.asarray, rollout.batch), jnp.asarray(rollout.old_logps - gap)
  )

  class Server:
    begin = staticmethod(lambda key, params, frozen, prompts: None)
    finish = staticmethod(lambda pending: sampled)

  parts = roles.PARTS._replace(score=roles.score_all, sampler=Server())
  method = ppo.make(config, parts, **SAMPLING)
  got, info = collected(method)
  weights = np.ones(mask.shape)
  for row, t in zip(*np.nonzero(mask), strict=True):
    weights[row, t] = min(np.exp(gap[row, t]), 1.25)
  assert (weights[mask] == 1.25).any() and (weights[mask] < 1).any()
  np.testing.assert_allclose(got.policy_weights, weights, rtol=1e-4)
  np.testing.assert_allclose(info["tis_weight"], weights[mask].mean(), rtol=1e-4)
  np.testing.assert_allclose(
    info["sampler_gap"], np.abs(gap[mask]).mean(), rtol=1e-3, atol=1e-5
  )
  metrics = loss_at_first(method, got).metrics
  np.testing.assert_allclose(
    metrics["policy_loss"], -(weights * got.advantages)[mask].mean(), rtol=1e-3
  )
  plain = loss_at_first(masked(), rollout).metrics
  np.testing.assert_allclose(metrics["value_loss"], plain["value_loss"], rtol=1e-4)


def test_policy_loss_of_weighted_tokens_by_hand():
  config = ppo.default_config()
  config.update(kl_coef=0.0, tis_max=2.0, value_coef=0.0)
  row = lambda *x: jnp.array([x], jnp.float32)
  mask = jnp.array([[True, True, True, False]])
  old, sampler = row(-1, -1, -1, 0), row(-1, -1 + np.log(2), -1 - np.log(4), 0)
  weights = ppo.compute_policy_weights(config, old, sampler, mask)
  np.testing.assert_allclose(weights, row(1, 0.5, 2, 1), rtol=1e-6)
  zeros = row(0, 0, 0, 0)
  rollout = Rollout(None, old, old, zeros, row(3, 4, -1, 9), zeros, weights)
  # Ratios of 1, 1.5 (clipped at 1.2) and 1.5 (not clipped: its advantage is below 0).
  logps = old + row(0, np.log(1.5), np.log(1.5), 0)
  loss = ppo.compute_ppo_loss(config, rollout, logps, zeros, mask)
  want = -(1 * 1 * 3 + 0.5 * 1.2 * 4 + 2 * 1.5 * -1) / 3
  np.testing.assert_allclose(loss.mean, want, rtol=1e-6)


def test_without_a_maximum_all_tokens_weigh_the_same(without_kl):
  rollout, info = without_kl
  assert (rollout.policy_weights == 1).all() and "tis_weight" not in info


def test_what_is_told_is_of_whole_responses(with_kl):
  rollout, info = with_kl
  mask = rollout.batch.loss_mask
  kl = np.where(mask, rollout.old_logps - rollout.ref_logps, 0)
  ended = ((rollout.batch.tokens == roles.EOS) & mask).any(axis=1)
  want = {
    "reward": info["scores"].mean(),
    "kl": kl.sum(axis=1).mean(),
    "length": mask.sum(axis=1).mean(),
    "stop_rate": ended.mean(),
    "invalid": 0,
  }
  for name, value in want.items():
    np.testing.assert_allclose(info[name], value, rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(info["row_kl"], kl.sum(axis=1), rtol=1e-4, atol=1e-6)


def test_a_maximum_below_0_is_refused():
  with pytest.raises(ValueError, match="tis_max must be 0 or more"):
    made(tis_max=-1.0)


def test_greedy_sampling_is_refused():
  with pytest.raises(ValueError, match="temperature must be above 0 .* not 0.0"):
    made(temperature=0.0)
