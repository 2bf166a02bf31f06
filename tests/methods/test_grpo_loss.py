"""The loss of GRPO, and what a step does, against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.bigrams import (
  FROZEN,
  LEARNED,
  NEW,
  PARAMS,
  ROWS,
  START,
  VALID,
  collected,
  give_responses,
  in_numpy,
  loss_and_grads,
  made,
  responses,
  scores,
  table,
)
from vlmrlaif_jax.methods import grpo


@pytest.fixture(autouse=True)
def _given_responses(monkeypatch):
  give_responses(monkeypatch)


def k3(log_ratio):
  return np.exp(log_ratio) - 1 - log_ratio


def mean_over(x, which, loss_aggregation):
  """Over some responses."""
  mask = np.asarray(responses().loss_mask)
  rows = [x[r][mask[r]] for r in np.flatnonzero(which)]
  if loss_aggregation == "token":
    return np.concatenate(rows).mean()
  if loss_aggregation == "response":
    return np.mean([row.mean() for row in rows])
  return np.mean([row.sum() / NEW for row in rows])


LOW, HIGH, DUAL = 0.1, 0.3, 1.4


def policy_losses(surrogate, ratio, a, logps):
  """(losses of tokens, ratios that are clipped), by the papers' formulas."""
  if surrogate == "gspo":
    mask = np.asarray(responses().loss_mask)
    mean = np.sum(np.log(ratio) * mask, axis=1) / mask.sum(axis=1)
    ratio = np.exp(mean)[:, None] + 0 * ratio
  clipped = np.clip(ratio, 1 - LOW, 1 + HIGH)
  if surrogate == "cispo":
    return -clipped * a * logps, ratio
  gain = np.minimum(ratio * a, clipped * a)
  if surrogate == "dual_clip":
    gain = np.where(a < 0, np.maximum(gain, DUAL * a), gain)
  return -gain, ratio


@pytest.mark.parametrize(
  ("surrogate", "loss_aggregation", "kl_direction", "sign"),
  [
    ("ppo_clip", "response", "new_to_ref", -1),
    ("cispo", "token", "old_to_new", 1),
    ("dual_clip", "constant", "new_to_ref", -1),
    ("gspo", "response", "old_to_new", 1),
  ],
)
def test_loss_is_that_of_the_formula(surrogate, loss_aggregation, kl_direction, sign):
  rollout, _ = collected()
  settings = dict(
    surrogate=surrogate,
    clip_eps_low=LOW,
    clip_eps_high=HIGH,
    dual_clip=DUAL,
    loss_aggregation=loss_aggregation,
    kl_direction=kl_direction,
    kl_coef=0.3,
    entropy_coef=0.2,
  )
  if loss_aggregation != "response":
    # The factors are by response; those of another aggregation are collected with it.
    rollout, _ = collected(loss_aggregation=loss_aggregation)
  moved = {"policy": jax.tree.map(lambda x, y: x + 0.2 * y, table(0), table(2))}
  (old, _), (new, entropy) = in_numpy(PARAMS["policy"]), in_numpy(moved["policy"])
  a = rollout.advantages.reshape(-1, 1)
  losses, ratio = policy_losses(surrogate, np.exp(new - old), a, new)
  kl = k3(sign * (new - in_numpy(FROZEN["ref"])[0]))
  loss, _ = loss_and_grads(rollout, params=moved, **settings)
  want = mean_over(losses, LEARNED, loss_aggregation)
  want += mean_over(0.3 * kl - 0.2 * entropy, VALID, loss_aggregation)
  np.testing.assert_allclose(loss.mean, want, rtol=1e-4, atol=1e-6)
  shown = "response" if loss_aggregation == "constant" else loss_aggregation
  is_clipped = (ratio < 1 - LOW) | (ratio > 1 + HIGH)
  for name, x in [
    ("anchor_kl", kl),
    ("policy_entropy", entropy),
    ("clip_fraction", is_clipped),
  ]:
    np.testing.assert_allclose(
      loss.metrics[name], mean_over(x, VALID, shown), rtol=1e-3, err_msg=name
    )
  np.testing.assert_allclose(
    loss.metrics["policy_loss"], mean_over(losses, LEARNED, shown), rtol=1e-3
  )
  assert 0.1 < loss.metrics["clip_fraction"] < 0.9


def test_tokens_weigh_what_the_trainer_computes_against_the_sampler():
  rollout, info = collected(tis_max=0.2, drop_uniform_groups=False)
  mask = np.asarray(responses().loss_mask)
  # The given responses have log-probability 0 by the sampler.
  weights = np.minimum(np.exp(in_numpy(PARAMS["policy"])[0]), 0.2)
  assert (weights[mask] < 0.2).any() and (weights[mask] == 0.2).any()
  got = rollout.policy_weights.reshape(ROWS, NEW)
  want = np.where(VALID[:, None] & mask, weights, 0)[:, START:]
  np.testing.assert_allclose(got, want, rtol=1e-4)
  np.testing.assert_allclose(info["tis_weight"], weights[mask].mean(), rtol=1e-4)


def test_an_advantage_and_a_surrogate_are_entries(monkeypatch):
  signs = lambda scores, valid, policy_logps: jnp.sign(scores) * valid
  plain = lambda config, logps, old_logps, advantages, mask: -advantages * logps
  monkeypatch.setitem(grpo.ADVANTAGES, "signs", signs)
  monkeypatch.setitem(grpo.SURROGATES, "reinforce", grpo.Surrogate(plain))
  settings = dict(advantage="signs", surrogate="reinforce", kl_coef=0.0)
  rollout, _ = collected(**settings)
  want = np.sign(np.nan_to_num(scores()))
  np.testing.assert_array_equal(rollout.advantages.reshape(-1), want)
  loss, grads = loss_and_grads(rollout, **settings)
  moved = jax.tree.map(lambda x, g: x - 0.1 * g, PARAMS, grads)
  logps = in_numpy(PARAMS["policy"])[0]
  losses = -want[:, None] * logps
  np.testing.assert_allclose(
    loss.mean, mean_over(losses, LEARNED, "response"), rtol=1e-4
  )
  better = want[:, None] * (in_numpy(moved["policy"])[0] - logps)
  assert mean_over(better, LEARNED, "response") > 1e-3


@pytest.mark.parametrize("kl_direction", grpo.KL_DIRECTIONS)
def test_kl_leads_back_to_its_anchor(kl_direction):
  logps, ref_logps = jnp.asarray([-1.0, -2.0]), jnp.asarray([-1.5, -1.0])
  total = lambda x: jnp.sum(grpo.KL_DIRECTIONS[kl_direction](x, ref_logps))
  assert (jnp.sign(jax.grad(total)(logps)) == jnp.sign(logps - ref_logps)).all()
  assert total(ref_logps) == 0


@pytest.mark.parametrize("loss_aggregation", grpo.LOSS_WEIGHTS)
def test_parts_of_a_rollout_join_by_weight(loss_aggregation):
  rollout, _ = collected()
  parts = [jax.tree.map(lambda x, i=i: x[i::3], rollout) for i in range(3)]
  loss = jax.jit(made(loss_aggregation=loss_aggregation).loss)
  whole, *split = (
    loss(PARAMS, FROZEN, jax.tree.map(jnp.asarray, part)) for part in [rollout, *parts]
  )
  assert len({float(part.weight) for part in split}) > 1
  joined = jax.tree.map(
    lambda *x: sum(a * b.weight for a, b in zip(x, split, strict=True)) / whole.weight,
    *((part.mean, part.metrics) for part in split),
  )
  chex.assert_trees_all_close(joined, (whole.mean, whole.metrics), rtol=1e-4, atol=1e-6)


def test_a_step_makes_the_best_of_each_group_likelier():
  rollout, _ = collected()
  _, grads = loss_and_grads(rollout, kl_coef=0.0)
  moved = jax.tree.map(lambda x, g: x - 0.1 * g, PARAMS, grads)
  mask = np.asarray(responses().loss_mask)
  change = in_numpy(moved["policy"])[0] - in_numpy(PARAMS["policy"])[0]
  change = np.sum(change * mask, axis=1) / mask.sum(axis=1)
  assert np.sum((change * rollout.advantages.reshape(-1))[LEARNED]) > 1e-3
