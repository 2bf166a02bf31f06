import jax
import numpy as np
import pytest

from tests.methods import roles
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.methods import rm


@pytest.fixture(scope="module")
def scores():
  """Of the chosen and of the rejected answers."""
  params, frozen = roles.roles()
  variables = merge_params(frozen["reward"], params["reward"])
  apply = jax.jit(lambda batch: roles.HEADED.apply(variables, batch, method="scores"))
  return tuple(np.asarray(apply(batch), np.float64) for batch in roles.sides())


def loss_of(**settings):
  config = rm.default_config()
  config.update(settings)
  method = rm.make(config, roles.PARTS)
  return jax.jit(method.loss)(*roles.roles(), roles.pairs())


def test_loss_is_bradley_terry_and_the_centre_term(scores):
  chosen, rejected = scores
  loss = loss_of(margin=0.5, centre_coef=0.1)
  ranking = np.mean(np.log1p(np.exp(-(chosen - rejected - 0.5))))
  centre = abs(np.mean(chosen + rejected))
  assert centre > 0.1  # Else the term would not show.
  np.testing.assert_allclose(loss.metrics["ranking_loss"], ranking, rtol=1e-5)
  np.testing.assert_allclose(loss.mean, ranking + 0.1 * centre, rtol=1e-5)
  assert loss.weight == roles.ROWS


def test_accuracy_is_the_share_of_pairs_in_the_right_order(scores):
  chosen, rejected = scores
  right = np.mean(chosen > rejected)
  assert 0 < right < 1
  np.testing.assert_allclose(loss_of().metrics["accuracy"], right, rtol=1e-6)
