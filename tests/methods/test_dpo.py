"""DPO of whole responses, against a plain loop over logits."""

import functools
import math

import jax
import numpy as np
import pytest

from tests.methods import roles
from vlmrlaif_jax.core.types import join
from vlmrlaif_jax.methods import dpo


def logps_by_loop(variables, batch):
  """(sum, mean) of the log-probabilities of each response's tokens."""
  logits = np.asarray(jax.jit(roles.MODEL.apply)(variables, batch), np.float64)
  mask, rows = np.asarray(batch.loss_mask), []
  for row, tokens in enumerate(np.asarray(batch.tokens)):
    each = []
    for t in np.flatnonzero(mask[row]):
      before = logits[row, t - 1]
      each.append(before[tokens[t]] - np.log(np.exp(before).sum()))
    rows.append((sum(each), sum(each) / len(each)))
  return np.array(rows).T


@pytest.fixture(scope="module")
def logps():
  """Of chosen and rejected under the policy, then under the reference; by kind."""
  params, frozen = roles.roles()
  policy = join(frozen["policy"], params["policy"])
  four = [logps_by_loop(v, b) for v in (policy, frozen["ref"]) for b in roles.sides()]
  return {"sum": [sums for sums, _ in four], "mean": [means for _, means in four]}


def made(**settings):
  config = dpo.default_config()
  config.update(settings)
  return dpo.make(config, roles.PARTS)


@functools.cache
def loss_of(kind):
  settings = dict(beta=0.3, label_smoothing=0.1, dpo_coef=2.0, sft_coef=0.5)
  method = made(logps=kind, **settings)
  return jax.jit(method.loss)(*roles.roles(), roles.compared_pairs(kind))


@pytest.fixture(scope="module")
def at_reference():
  """The loss of a policy that is the reference, and its slopes by its weights."""
  method, pairs = made(), roles.compared_pairs()
  _, frozen = roles.roles()

  def mean_of(policy):
    # As the reference is: its base, too, has other weights than the policy's.
    loss = method.loss({"policy": {"lora": policy}}, {"policy": frozen["ref"]}, pairs)
    return loss.mean, loss

  lora = frozen["ref"]["lora"]
  (_, loss), slopes = jax.jit(jax.value_and_grad(mean_of, has_aux=True))(lora)
  return loss, jax.tree.leaves(slopes)


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_loss_is_dpo_of_the_responses_and_the_sft_term(logps, kind):
  chosen, rejected, ref_chosen, ref_rejected = logps[kind]
  margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
  softplus = lambda x: np.log1p(np.exp(x))
  preference = np.mean(0.9 * softplus(-margin) + 0.1 * softplus(margin))
  loss = loss_of(kind)
  np.testing.assert_allclose(loss.metrics["dpo_loss"], preference, rtol=1e-5)
  np.testing.assert_allclose(loss.mean, 2 * preference - 0.5 * chosen.mean(), rtol=1e-5)
  assert loss.weight == roles.ROWS


def test_metrics_are_of_the_implied_rewards(logps):
  chosen, rejected, ref_chosen, ref_rejected = logps["sum"]
  good, bad = 0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected)
  accuracy = np.mean(good > bad)
  assert 0 < accuracy < 1
  expected = {
    "accuracy": accuracy,
    "margin": np.mean(good - bad),
    "chosen_reward": good.mean(),
    "rejected_reward": bad.mean(),
    "chosen_logps": chosen.mean(),
    "rejected_logps": rejected.mean(),
  }
  metrics = loss_of("sum").metrics
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5)


def test_policy_that_is_the_reference_starts_at_log_two(at_reference):
  loss, _ = at_reference
  np.testing.assert_allclose(loss.mean, math.log(2), rtol=1e-6)
  np.testing.assert_allclose(loss.metrics["margin"], 0, atol=1e-6)


def test_policy_that_is_the_reference_moves_from_it(at_reference):
  _, slopes = at_reference
  assert max(float(abs(slope).max()) for slope in slopes) > 1e-3


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("ipo", lambda c, r, rc, rr: ((c - rc) - (r - rr) - 1 / 0.6) ** 2),
    ("simpo", lambda c, r, *_: np.log1p(np.exp(0.5 - 0.3 * (c - r)))),
    ("orpo", lambda c, r, *_: np.log1p(odds(r) / odds(c))),
  ],
)
def test_kin_of_dpo_are_losses_of_mean_tokens(logps, name, expected):
  method = made(loss=name, logps="mean", beta=0.3, margin=0.5)
  loss = jax.jit(method.loss)(*roles.roles(), roles.compared_pairs("mean"))
  mean = expected(*logps["mean"]).mean()
  np.testing.assert_allclose(loss.mean, mean, rtol=1e-4)
  np.testing.assert_allclose(loss.metrics[f"{name}_loss"], mean, rtol=1e-4)


def odds(logps):
  return np.exp(logps) / -np.expm1(logps)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"loss": "kto"}, "loss must be one of dpo, ipo, simpo, orpo, not 'kto'"),
    ({"loss": "simpo"}, "logps must be \"mean\" for loss='simpo'"),
    ({"logps": "total"}, "logps must be one of sum, mean, not 'total'"),
    ({"beta": 0.0}, "beta must be above 0, not 0.0"),
    ({"label_smoothing": 0.6}, "label_smoothing must be from 0 to 0.5, not 0.6"),
  ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    made(**settings)
