"""Losses of packed examples are those of the same examples in rows of their own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods import roles
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.data import packing
from vlmrlaif_jax.data.tokenization import TokenRows
from vlmrlaif_jax.methods import sft
from vlmrlaif_jax.training.update import init_state, make_update

TIME = 104  # Two to three examples, of 22 to 30 tokens, in a row.


@functools.cache
def encoded(seed):
  """Examples whose videos are features already."""
  _, frozen = roles.roles()
  batch = roles.answered(seed)
  encode = jax.jit(functools.partial(roles.MODEL.apply, method="encode"))
  return batch._replace(video=encode(frozen["policy"], batch.video))


def packed(batch, rows):
  """The examples of a batch, packed in so many rows."""
  videos = np.asarray(batch.video)
  given = TokenRows(*map(np.asarray, batch[1:]))
  layout = packing.assign_first_fit(given.mask.sum(axis=1), TIME)
  shape = packing.PackedShape(rows, TIME, max(len(row) for row in layout))
  assert len(layout) < rows < len(videos)  # Some row is empty.
  made = packing.pack_rows(given, layout, shape, lambda i: videos[i], pad=roles.PAD)
  return jax.tree.map(jnp.asarray, made)


CHUNKED = roles.MODEL.clone(llm=roles.MODEL.llm.clone(attention="chunked"))


def updated(data, parts=roles.PARTS, microbatches=1):
  """The params after a step, and its metrics."""
  params, frozen = roles.roles()
  tx = optax.sgd(1.0)
  loss = sft.make(sft.default_config(), parts).loss
  step = jax.jit(make_update(loss, tx, microbatches=microbatches))
  state, metrics = step(init_state(params, tx), frozen, data)
  return jax.device_get((state.params, metrics))


@functools.cache
def plain():
  return updated(encoded(0))


def assert_same(got, want):
  assert want[1]["grad_norm"] > 1e-3 and not want[1]["skipped"]
  chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [roles.MODEL, CHUNKED])
def test_sft_of_packed_examples_is_that_of_plain_ones(model):
  data = packed(encoded(0), rows=4)
  assert_same(updated(data, roles.PARTS._replace(policy=model)), plain())


def test_sft_of_packed_examples_is_that_of_plain_ones_in_any_microbatches():
  assert_same(updated(packed(encoded(0), rows=4), microbatches=2), plain())


def test_sft_of_packed_examples_is_that_of_plain_ones_on_any_mesh():
  mesh = sharding.make_mesh(data=2, fsdp=2)
  with jax.set_mesh(mesh):
    got = updated(sharding.shard_batch(packed(encoded(0), rows=4), mesh))
  assert_same(got, plain())
