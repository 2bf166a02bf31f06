"""Losses of packed examples are those of the same examples in rows of their own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods import roles
from vlmrlaif_jax import sharding
from vlmrlaif_jax.data import packing
from vlmrlaif_jax.data.text import Rows
from vlmrlaif_jax.methods import dpo, rm, sft
from vlmrlaif_jax.types import ComparedPairs, Pairs
from vlmrlaif_jax.update import init_state, make_update

TIME = 104  # Two to three examples, of 22 to 30 tokens, in a row; one pair.


@functools.cache
def encoded(seed):
  """Examples whose videos are features already."""
  _, frozen = roles.roles()
  batch = roles.answered(seed)
  encode = jax.jit(functools.partial(roles.MODEL.apply, method="encode"))
  return batch._replace(video=encode(frozen["policy"], batch.video))


def packed(*sides, rows):
  """(packed examples, the number of each place's)."""
  videos = np.asarray(sides[0].video)
  given = [Rows(*map(np.asarray, side[1:])) for side in sides]
  layout = packing.first_fit(packing.lengths_of(given), TIME)
  shape = packing.Shape(rows, TIME, max(len(row) for row in layout))
  assert len(layout) < rows < len(videos) * len(sides)  # Some row is empty.
  numbers = np.zeros((rows, shape.videos), int)
  for row, which in zip(numbers, layout, strict=False):
    row[: len(which)] = which
  made = packing.pack(given, layout, shape, lambda i: videos[i], pad=roles.PAD)
  return jax.tree.map(jnp.asarray, made), numbers


def pairs():
  return Pairs(encoded(0), encoded(1)._replace(video=encoded(0).video))


def of_sft():
  return encoded(0), packed(encoded(0), rows=4)[0]


def of_rm():
  return pairs(), packed(*pairs(), rows=8)[0]


def of_dpo(kind="sum"):
  ref_logps = roles.compared_pairs(kind).ref_logps
  rows, numbers = packed(*pairs(), rows=8)
  return ComparedPairs(pairs(), ref_logps), ComparedPairs(rows, ref_logps[numbers])


METHODS = {
  "sft": (sft, of_sft, {}),
  "rm": (rm, of_rm, {"margin": 0.3, "centre_coef": 0.1}),
  "dpo": (dpo, of_dpo, {"sft_coef": 0.2}),
  "orpo": (
    dpo,
    lambda: of_dpo("mean"),
    {"loss": "orpo", "logps": "mean"},
  ),
}


def made(name, **more):
  module, data, settings = METHODS[name]
  config = module.default_config()
  config.update({**settings, **more})
  return module.make(config, roles.PARTS), *data()


def updated(method, data, microbatches=1):
  params, frozen = roles.roles()
  step = jax.jit(make_update(method.loss, optax.sgd(1.0), microbatches=microbatches))
  state, metrics = step(init_state(params, optax.sgd(1.0)), frozen, data)
  return jax.device_get((state.params, metrics))


@functools.cache
def plain(name):
  """The params after a step, and its metrics."""
  method, data, _ = made(name)
  return updated(method, data)


def assert_same(got, want):
  assert want[1]["grad_norm"] > 1e-3 and not want[1]["skipped"]
  chex.assert_trees_all_close(got, want, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_packed_is_as_plain_in_loss_and_gradient(name):
  method, _, data = made(name)
  assert_same(updated(method, data), plain(name))


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_packed_does_not_depend_on_microbatches(name):
  method, _, data = made(name)
  assert_same(updated(method, data, microbatches=2), plain(name))


def test_packed_does_not_depend_on_the_mesh():
  method, _, data = made("rm")
  mesh = sharding.make_mesh(data=2, fsdp=2)
  with jax.set_mesh(mesh):
    got = updated(method, sharding.put(data, mesh))
  assert_same(got, plain("rm"))


def test_packed_weighs_what_plain_weighs():
  for name in ("sft", "rm", "dpo"):
    method, data, rows = made(name)
    loss = lambda data, method=method: method.loss(*roles.roles(), data).weight
    assert jax.jit(loss)(rows) == jax.jit(loss)(data) > 1


def test_chunked_attention_reads_packed_rows_alike():
  params, frozen = roles.roles()
  llm = roles.MODEL.llm.clone(attention="chunked")
  method = sft.make(
    sft.default_config(),
    roles.PARTS._replace(policy=roles.MODEL.clone(llm=llm)),
  )
  assert_same(updated(method, of_sft()[1]), plain("sft"))
