"""DPO of whole responses, against a plain loop over logits."""

import math

import jax
import numpy as np
import pytest

from tests.methods import roles
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.methods import dpo


def logps_by_loop(variables, batch):
  """The log-probability of each response."""
  logits = np.asarray(jax.jit(roles.MODEL.apply)(variables, batch), np.float64)
  mask, rows = np.asarray(batch.loss_mask), []
  for row, tokens in enumerate(np.asarray(batch.tokens)):
    each = []
    for t in np.flatnonzero(mask[row]):
      before = logits[row, t - 1]
      each.append(before[tokens[t]] - np.log(np.exp(before).sum()))
    rows.append(sum(each))
  return np.array(rows)


@pytest.fixture(scope="module")
def logps():
  """Of chosen and rejected under the policy, then under the reference."""
  params, frozen = roles.roles()
  policy = merge_params(frozen["policy"], params["policy"])
  return [logps_by_loop(v, b) for v in (policy, frozen["ref"]) for b in roles.sides()]


def made(**settings):
  config = dpo.default_config()
  config.update(settings)
  return dpo.make(config, roles.PARTS)


@pytest.fixture(scope="module")
def loss():
  method = made(beta=0.3, sft_coef=0.5)
  return jax.jit(method.loss)(*roles.roles(), roles.compared_pairs())


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


def test_loss_is_dpo_of_the_responses_and_the_sft_term(logps, loss):
  chosen, rejected, ref_chosen, ref_rejected = logps
  margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
  preference = np.mean(np.log1p(np.exp(-margin)))
  np.testing.assert_allclose(loss.metrics["dpo_loss"], preference, rtol=1e-5)
  np.testing.assert_allclose(loss.mean, preference - 0.5 * chosen.mean(), rtol=1e-5)
  assert loss.weight == roles.ROWS


def test_metrics_are_of_the_implied_rewards(logps, loss):
  chosen, rejected, ref_chosen, ref_rejected = logps
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
  for name, value in expected.items():
    np.testing.assert_allclose(loss.metrics[name], value, rtol=1e-4, atol=1e-5)


def test_policy_that_is_the_reference_starts_at_log_two(at_reference):
  loss, _ = at_reference
  np.testing.assert_allclose(loss.mean, math.log(2), rtol=1e-6)
  np.testing.assert_allclose(loss.metrics["margin"], 0, atol=1e-6)


def test_policy_that_is_the_reference_moves_from_it(at_reference):
  _, slopes = at_reference
  assert max(float(abs(slope).max()) for slope in slopes) > 1e-3


def test_a_beta_without_a_meaning_is_refused():
  with pytest.raises(ValueError, match=r"beta must be above 0, not 0\.0"):
    made(beta=0.0)
