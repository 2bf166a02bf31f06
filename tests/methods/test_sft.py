import jax
import numpy as np

from tests.methods import roles
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.methods import sft


def test_loss_is_that_of_a_plain_loop():
  params, frozen = roles.roles()
  batch = roles.answered()
  loss = sft.make(sft.default_config(), roles.PARTS).loss(params, frozen, batch)
  variables = merge_params(frozen["policy"], params["policy"])
  logits = np.asarray(jax.jit(roles.MODEL.apply)(variables, batch), np.float64)
  total, count = 0.0, 0
  for row in range(roles.ROWS):
    for t in range(roles.START, roles.START + roles.NEW):
      if batch.loss_mask[row, t]:
        before = logits[row, t - 1]
        total -= before[batch.tokens[row, t]] - np.log(np.exp(before).sum())
        count += 1
  assert count == sum(range(1, roles.ROWS + 1)) == loss.weight
  np.testing.assert_allclose(loss.mean, total / count, rtol=1e-5)


def test_time_is_taken_in_chunks_of_any_size():
  params, frozen = roles.roles()
  losses = []
  for chunk in (1, 5, 1000):
    config = sft.default_config()
    config.chunk = chunk
    method = sft.make(config, roles.PARTS)
    losses.append(jax.jit(method.loss)(params, frozen, roles.answered()).mean)
  np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
