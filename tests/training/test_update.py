"""From a loss to an update step. conftest.py makes four virtual devices."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vlmrlaif_jax.core.sharding import make_mesh, replicate, shard_batch, shard_by_rules
from vlmrlaif_jax.core.types import Loss
from vlmrlaif_jax.losses.masked import masked_mean
from vlmrlaif_jax.training.update import (
  default_config,
  init_state,
  make_optimizer,
  make_update,
)


def optimizer(steps=1000, **settings):
  config = default_config()
  config.update({"learning_rate": 3e-5, **settings})
  return make_optimizer(config, steps)


class Experience(NamedTuple):
  x: jax.Array
  target: jax.Array
  mask: jax.Array


def mlp_loss(params, frozen, experience):
  """Squared error of a two-layer network, over the real tokens."""
  h = jnp.tanh(experience.x @ (frozen["up"] + params["up"]) + params["bias"])
  error = (h @ params["down"])[..., 0] - experience.target
  mean = masked_mean(error**2, experience.mask)
  weight = jnp.sum(experience.mask).astype(jnp.float32)
  return Loss(mean, weight, {"error": masked_mean(error, experience.mask)})


def network():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  frozen = {"up": normal(4, 8)}
  return {"up": normal(4, 8), "bias": jnp.zeros(8), "down": normal(8, 2)}, frozen


def experience_of():
  """Rows with very unequal numbers of tokens; some with none."""
  rng, rows = np.random.default_rng(1), 8
  lengths = (np.arange(rows) * 3) % 7
  return Experience(
    rng.normal(size=(rows, 6, 4)).astype(np.float32),
    rng.normal(size=(rows, 6)).astype(np.float32),
    np.arange(6) < lengths[:, None],
  )


def plain_sgd_step(params, frozen, experience, rate):
  """One step down the gradient of the loss of the whole batch."""
  mean = lambda *args: mlp_loss(*args).mean
  grads = jax.jit(jax.grad(mean))(params, frozen, experience)
  return jax.tree.map(lambda p, g: p - rate * g, params, grads), grads


def close(a, b):
  chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


def updated(loss, experience, tx=None, **settings):
  """(state, metrics) after one jitted step, and the state before."""
  params, frozen = network()
  tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
  before = init_state(params, tx)
  update = jax.jit(make_update(loss, tx, **settings))
  return *update(before, frozen, experience), before


@functools.cache
def whole():
  """(state, metrics) after one step on the whole batch at once."""
  return updated(mlp_loss, experience_of())[:2]


def test_update_descends_the_gradient():
  params, frozen = network()
  expected, grads = plain_sgd_step(params, frozen, experience_of(), 0.1)
  state, metrics = whole()
  close(state.params, expected)
  close(metrics["grad_norm"], optax.tree.norm(grads))
  close(metrics["loss"], jax.jit(mlp_loss)(params, frozen, experience_of()).mean)
  assert state.step == 1 and metrics["skipped"] == 0


@pytest.mark.parametrize("microbatches", [2, 8])
def test_update_does_not_depend_on_microbatches(microbatches):
  close(updated(mlp_loss, experience_of(), microbatches=microbatches)[:2], whole())


def test_update_joins_parts_by_weight_below_one():
  light = lambda *x: mlp_loss(*x)._replace(weight=mlp_loss(*x).weight / 1000)
  close(updated(light, experience_of(), microbatches=4)[:2], whole())


def test_update_ignores_parts_without_items_even_if_nan():
  def careless(params, frozen, part):
    out = mlp_loss(params, frozen, part)
    mean = out.mean * out.weight / out.weight  # NaN where there is no item.
    return Loss(mean, out.weight, {"error": out.metrics["error"] / out.weight * 0})

  experience = experience_of()  # Rows 0 and 7 have no token.
  state, metrics, _ = updated(careless, experience, microbatches=8)
  close(state.params, whole()[0].params)
  assert metrics["error"] == 0


def test_update_accepts_any_pytree_as_experience():
  nested = lambda params, frozen, tree: mlp_loss(params, frozen, tree["in"][0])
  got = updated(nested, {"in": (experience_of(), None)}, microbatches=2)[0]
  close(got, whole()[0])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_update_is_the_same_on_any_mesh(microbatches):
  params, frozen = network()
  tx = optimizer()
  state = init_state(params, tx)
  update = jax.jit(make_update(mlp_loss, tx, microbatches=microbatches))
  expected = update(state, frozen, experience_of())

  mesh = make_mesh(data=1, fsdp=2, tensor=2)
  rules = [("up", P("fsdp", "tensor")), ("down", P("tensor", "fsdp")), ("bias", P())]
  place = lambda tree: jax.device_put(tree, shard_by_rules(tree, rules, mesh))
  got = update(place(state), place(frozen), shard_batch(experience_of(), mesh))
  close(got, expected)
  assert got[0].params["up"].sharding.spec == P("fsdp", "tensor")


def test_microbatches_leave_rows_on_their_devices():
  params, frozen = network()
  mesh = make_mesh(fsdp=4)
  tx = optax.sgd(0.1)
  update = jax.jit(make_update(mlp_loss, tx, microbatches=2))
  state, frozen = replicate((init_state(params, tx), frozen), mesh)
  text = (
    update.lower(state, frozen, shard_batch(experience_of(), mesh)).compile().as_text()
  )
  assert "all-reduce" in text  # Of gradients: the rows are indeed apart.
  assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_update_skips_a_gradient_that_is_not_finite(bad):
  experience = experience_of()
  experience.x[3, 0, 0] = bad
  state, metrics, before = updated(mlp_loss, experience, optimizer())
  chex.assert_trees_all_equal(state, before._replace(step=jnp.array(1)))
  assert metrics["skipped"] == 1
  assert not jnp.isfinite(metrics["grad_norm"])


def test_update_skips_a_change_that_is_not_finite():
  state, metrics, before = updated(mlp_loss, experience_of(), optax.sgd(1e30))
  chex.assert_trees_all_equal(state, before._replace(step=jnp.array(1)))
  assert metrics["skipped"] == 1 and jnp.isinf(metrics["update_ratio"])
  assert jnp.isfinite(metrics["grad_norm"])


def test_update_ratio_is_the_change_relative_to_the_params():
  state, metrics, before = updated(mlp_loss, experience_of(), optax.sgd(0.1))
  change = jax.tree.map(jnp.subtract, state.params, before.params)
  want = optax.tree.norm(change) / optax.tree.norm(before.params)
  np.testing.assert_allclose(metrics["update_ratio"], want, rtol=1e-3)


def test_update_learns_on_after_a_skip():
  params, frozen = network()
  tx = optimizer()
  update = jax.jit(make_update(mlp_loss, tx))
  poisoned = experience_of()
  poisoned.x[3] = math.nan
  state, _ = update(init_state(params, tx), frozen, poisoned)
  state, metrics = update(state, frozen, experience_of())
  close(state.params, updated(mlp_loss, experience_of(), tx)[0].params)
  assert state.step == 2 and metrics["skipped"] == 0


def test_update_with_nothing_to_learn_from_changes_nothing():
  tx = optimizer(weight_decay=0.1)  # Would shrink the parameters all the same.
  nothing = experience_of()._replace(mask=np.zeros((8, 6), bool))
  state, metrics, before = updated(mlp_loss, nothing, tx)
  chex.assert_trees_all_equal(state, before._replace(step=jnp.array(1)))
  assert metrics["skipped"] == 1 and metrics["loss"] == 0


def test_update_keeps_the_dtypes_of_the_state():
  params, frozen = network()
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  tx = optimizer()
  before = init_state(params, tx)
  after, _ = jax.jit(make_update(mlp_loss, tx))(before, frozen, experience_of())
  chex.assert_trees_all_equal_shapes_and_dtypes(after, before)


def test_update_refuses_a_batch_that_does_not_split():
  message = r"8 rows does not split into 3 .* one of \[1, 2, 4, 8\]"
  with pytest.raises(ValueError, match=message):
    updated(mlp_loss, experience_of(), microbatches=3)


@pytest.mark.parametrize("odd", [np.zeros(4, np.float32), np.float32(0)])
def test_update_refuses_leaves_of_other_batches(odd):
  with pytest.raises(ValueError, match="the same batch as its first axis"):
    updated(mlp_loss, experience_of()._replace(target=odd))


def learning_rates(**settings):
  """Of the first ten steps: what a gradient of sign 1 moves Adam by."""
  given = {"learning_rate": 1.0, "steps": 10, "clip_norm": math.inf}
  tx = optimizer(**{**given, **settings})
  params, rates = {"w": jnp.zeros(1)}, []
  state = tx.init(params)
  step = jax.jit(tx.update)
  for _ in range(10):
    move, state = step({"w": jnp.ones(1)}, state, params)
    rates.append(-float(move["w"][0]))
  return rates


def test_learning_rate_is_constant_by_default():
  np.testing.assert_allclose(learning_rates(), 1.0, rtol=1e-4)


def test_learning_rate_warms_up_from_the_first_step():
  rates = learning_rates(warmup_steps=4)
  np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-4)


def test_learning_rate_falls_as_a_cosine_after_warm_up():
  rates = learning_rates(warmup_steps=2, schedule="cosine")
  expected = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
  np.testing.assert_allclose(rates[2:], expected, rtol=1e-4)


def test_optimizer_refuses_an_unknown_schedule():
  with pytest.raises(ValueError, match="schedule .*'linear'"):
    learning_rates(schedule="linear")


@pytest.mark.parametrize("warmup", [-1, 10])
def test_optimizer_refuses_a_warm_up_without_end(warmup):
  with pytest.raises(ValueError, match=f"warmup_steps .* not {warmup}"):
    learning_rates(warmup_steps=warmup)


def test_weight_decay_leaves_out_norms_biases_and_vectors():
  tx = optimizer(weight_decay=0.5)
  layers = jnp.ones((2, 3))  # Stacked over two layers, a vector has two axes.
  params = {
    "blocks": {"attention_norm": {"scale": layers}, "q": {"bias": layers, "a": layers}},
    "class_embedding": jnp.ones(3),
    "head": {"kernel": layers},
  }
  zeros = jax.tree.map(jnp.zeros_like, params)
  moves, _ = tx.update(zeros, tx.init(params), params)
  moved = jax.tree.map(lambda x: bool(x.any()), moves)
  assert moved == {
    "blocks": {"attention_norm": {"scale": False}, "q": {"bias": False, "a": True}},
    "class_embedding": False,
    "head": {"kernel": True},
  }


def test_optimizer_clips_the_gradient_by_its_norm():
  tx = optimizer(clip_norm=1.0, b1=0.0)
  params = {"w": jnp.zeros(2)}
  _, state = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
  adam = optax.tree.get(state, "mu")
  np.testing.assert_allclose(adam["w"], [0.6, 0.8], rtol=1e-6)
