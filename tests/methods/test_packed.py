"""Losses of packed examples are those of the same examples in rows of their own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.methods import roles
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import ComparedPairs
from vlmrlaif_jax.data import packing
from vlmrlaif_jax.data.tokenization import Rows
from vlmrlaif_jax.methods import dpo, rm, sft
from vlmrlaif_jax.training.update import init_state, make_update

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


def sides():
  return encoded(0), encoded(1)


def pairs():
  groups = roles.pairs()
  return groups._replace(prompts=groups.prompts._replace(video=encoded(0).video))


def of_sft():
  return encoded(0), packed(encoded(0), rows=4)[0]


def of_rm():
  return pairs(), packed(*sides(), rows=8)[0]


def of_dpo():
  ref_logps = roles.compared_pairs().ref_logps
  rows, numbers = packed(*sides(), rows=8)
  return ComparedPairs(pairs(), ref_logps), ComparedPairs(rows, ref_logps[numbers])


METHODS = {
  "sft": (sft, of_sft, {}),
  "rm": (rm, of_rm, {"margin": 0.3, "centre_coef": 0.1}),
  "dpo": (dpo, of_dpo, {"sft_coef": 0.2}),
}
CHUNKED = roles.MODEL.clone(llm=roles.MODEL.llm.clone(attention="chunked"))


def updated(name, data, parts=roles.PARTS, microbatches=1):
  """The params after a step, and its metrics."""
  module, _, settings = METHODS[name]
  config = module.default_config()
  config.update(settings)
  params, frozen = roles.roles()
  tx = optax.sgd(1.0)
  loss = module.make(config, parts).loss
  step = jax.jit(make_update(loss, tx, microbatches=microbatches))
  state, metrics = step(init_state(params, tx), frozen, data)
  return jax.device_get((state.params, metrics))


@functools.cache
def plain(name):
  data, _ = METHODS[name][1]()
  return updated(name, data)


def assert_same(got, want):
  assert want[1]["grad_norm"] > 1e-3 and not want[1]["skipped"]
  chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-4)


def test_sft_of_packed_examples_is_that_of_plain_ones():
  _, data = of_sft()
  got = updated("sft", data, roles.PARTS._replace(policy=CHUNKED))
  assert_same(got, plain("sft"))


def test_rm_of_packed_pairs_is_that_of_plain_ones_on_any_mesh():
  _, data = of_rm()
  mesh = sharding.make_mesh(data=2, fsdp=2)
  with jax.set_mesh(mesh):
    got = updated("rm", sharding.put(data, mesh))
  assert_same(got, plain("rm"))


def test_dpo_of_packed_pairs_is_that_of_plain_ones_in_any_microbatches():
  _, data = of_dpo()
  assert_same(updated("dpo", data, microbatches=2), plain("dpo"))


def test_means_of_packed_responses_are_those_of_plain_ones():
  plain_pairs, (rows, numbers) = pairs(), packed(*sides(), rows=8)
  config = dpo.default_config()
  config.logps = "mean"
  _, frozen = roles.roles()
  run = lambda f, data: jax.jit(lambda v: f(config, roles.MODEL, v, data))(
    frozen["ref"]
  )
  got, want = run(dpo.packed_pair_logps, rows), run(dpo.pair_logps, plain_pairs)
  real = dpo.packed_pairs(rows)
  assert real.sum() == roles.ROWS and (got[~real] == -1).all()
  np.testing.assert_allclose(got[real], want[numbers.reshape(-1)[real]], atol=1e-5)
