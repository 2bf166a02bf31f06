"""Positions that jump: what is sampled is what training reads, however it is laid out.

A video's positions say nothing about its number of tokens: the largest one may be far
below or far above it, and differs by axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import roles
from vlmrlaif_jax.core.types import flatten_groups, group_rows
from vlmrlaif_jax.data import packing
from vlmrlaif_jax.data.tokenization import TokenRows
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.models.decoders import qwen3
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.sampling.generate import (
  compute_group_logps,
  compute_response_logps,
  generate,
)

LLM = qwen3.Model(
  **qwen3.VARIANTS["tiny"], rank=4, mrope=(4, 2, 2), mrope_interleaved=True
)
MODEL = vlm.VLM(roles.TOWER, Projector(32), LLM)
HEADED = MODEL.clone(scalar_head=True)
NEW, START, SAMPLES = 9, roles.START, 2
LARGEST = [40, 7, 3, 300, 12, 21]  # Of each row's prompt; 20 to 22 tokens are in it.


def make_prompts():
  """The roles' prompts, padded on the left, with random positions on three axes."""
  rng, prompts = np.random.default_rng(0), roles.prompts()
  masks = np.asarray(prompts.mask)
  positions = rng.integers(900, 999, (*prompts.tokens.shape, 3))  # At the padding.
  for row, largest, mask in zip(positions, LARGEST, masks, strict=True):
    row[mask] = rng.integers(0, largest, (mask.sum(), 3))
    place = np.flatnonzero(mask)[len(row) // 3]  # The largest is not the last one.
    row[place, 1] = largest
  features = rng.normal(size=(roles.ROWS, roles.FRAMES, 16, 32)).astype(np.float32)
  return prompts._replace(
    video=jnp.asarray(features), positions=jnp.asarray(positions, jnp.int32)
  )


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def variables():
  variables = jax.jit(HEADED.init)(jax.random.key(0), PROMPTS)
  return roles.noisy(variables, 1, 0.1)


@functools.cache
def sampler(**settings):
  fixed = dict(max_new=NEW, stops=(roles.EOS,), pad=roles.PAD, vocab=roles.VOCAB)
  fixed |= dict(temperature=1.0, samples=SAMPLES)
  return jax.jit(functools.partial(generate, MODEL, **{**fixed, **settings}))


@pytest.fixture(scope="module")
def sampled(variables):
  out = sampler()(variables, PROMPTS, jax.random.key(0))
  lengths = np.asarray(out.batch.loss_mask.sum(axis=1))
  assert lengths.min() < 3 and lengths.max() == NEW
  return out


def trainer_logps(variables, batch, model=MODEL):
  score = functools.partial(
    compute_response_logps, model, start=START, chunk=8, temperature=1.0
  )
  return jax.jit(score)(variables, batch)[0]


def test_responses_continue_after_the_largest_position_on_every_axis(sampled):
  batch = sampled.batch
  got = np.asarray(batch.positions)[:, START:]
  first = np.repeat(LARGEST, SAMPLES)[:, None] + 1
  want = np.where(batch.mask[:, START:], first + np.arange(NEW), -1)
  for axis in range(3):
    real = np.where(batch.mask[:, START:], got[..., axis], -1)
    np.testing.assert_array_equal(real, want)
  prompts = np.repeat(PROMPTS.positions, SAMPLES, axis=0)
  np.testing.assert_array_equal(batch.positions[:, :START], prompts)


def test_logps_of_the_sampler_are_those_of_the_trainer(variables, sampled):
  got = trainer_logps(variables, sampled.batch)
  np.testing.assert_allclose(sampled.logps, got, atol=1e-5)
  counted = jnp.maximum(jnp.cumsum(sampled.batch.mask, axis=1) - 1, 0)[..., None]
  other = trainer_logps(variables, sampled.batch._replace(positions=counted))
  assert np.abs(other - got).max() > 0.01  # Positions matter at all.


def test_few_slots_sample_the_same(variables, sampled):
  got = sampler(slots=4)(variables, PROMPTS, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, got.batch, sampled.batch)
  np.testing.assert_allclose(got.logps, sampled.logps, rtol=1e-6, atol=1e-6)


def test_a_shared_prompt_changes_no_logp(variables, sampled):
  groups = group_rows(sampled.batch, group=SAMPLES, start=START)
  jax.tree.map(np.testing.assert_array_equal, flatten_groups(groups), sampled.batch)
  settings = dict(chunk=8, temperature=1.0)
  score = lambda shared: jax.jit(
    functools.partial(compute_group_logps, MODEL, shared=shared, **settings)
  )(variables, groups)[0]
  want = sampled.logps[:, START:].reshape(-1, SAMPLES, NEW)
  for shared in (False, True):
    np.testing.assert_allclose(score(shared), want, atol=1e-5)


def test_padding_on_the_other_side_changes_no_logp(variables, sampled):
  """Every row moved to the left as a whole, so that all padding follows it."""
  batch = sampled.batch
  order = jnp.argsort(~batch.mask, axis=1, stable=True)
  move = lambda x: jnp.take_along_axis(
    x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1
  )
  moved = batch._replace(**{name: move(x) for name, x in batch._asdict().items()
                            if name != "video"})  # fmt: skip
  score = functools.partial(
    compute_response_logps, MODEL, start=1, chunk=8, temperature=1.0
  )
  got = jax.jit(score)(variables, moved)[0]
  np.testing.assert_allclose(got, move(sampled.logps), atol=1e-5)


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_packed_rows_have_the_same_logps(variables, sampled, attention):
  batch = jax.device_get(sampled.batch)
  lengths = batch.mask.sum(axis=1)
  layout = packing.assign_first_fit(lengths, 100)
  shape = packing.PackedShape(len(layout), 100, max(map(len, layout)))
  rows, videos = TokenRows(*batch[1:]), batch.video
  packed = packing.pack_rows(rows, layout, shape, lambda i: videos[i], pad=roles.PAD)
  model = MODEL.clone(llm=LLM.clone(attention=attention))
  score = functools.partial(
    compute_response_logps, model, start=1, chunk=8, temperature=1.0
  )
  packed = jax.tree.map(jnp.asarray, packed)
  got = np.asarray(jax.jit(score)(variables, packed)[0])
  for row, numbers in enumerate(layout):
    want = [sampled.logps[i][batch.mask[i]] for i in numbers]
    end = sum(map(len, want))
    np.testing.assert_allclose(got[row, :end], np.concatenate(want), atol=1e-5)


def test_a_suffix_continues_the_response(sampled):
  longer = rewards.append_suffix(sampled.batch, (3, 4))
  lengths = np.asarray(sampled.batch.loss_mask.sum(axis=1))
  last = np.repeat(LARGEST, SAMPLES) + lengths
  want = last[:, None, None] + np.arange(1, 3)[:, None] + np.zeros(3, int)
  np.testing.assert_array_equal(longer.positions[:, -2:], want)
  groups = group_rows(sampled.batch, group=SAMPLES, start=START)
  again = flatten_groups(rewards.append_suffix(groups, (3, 4)))
  jax.tree.map(np.testing.assert_array_equal, again, longer)


def test_scores_do_not_depend_on_the_gap_before_the_suffix(variables, sampled):
  batch = sampled.batch
  wide = batch._replace(
    tokens=jnp.pad(batch.tokens, [(0, 0), (0, 5)]),
    mask=jnp.pad(batch.mask, [(0, 0), (0, 5)]),
    loss_mask=jnp.pad(batch.loss_mask, [(0, 0), (0, 5)]),
    positions=jnp.pad(batch.positions, [(0, 0), (0, 5), (0, 0)]),
  )
  score = jax.jit(rewards.compute_scalar_scores, static_argnums=(0, 3))
  want = score(HEADED, variables, batch, (3, 4))
  got = score(HEADED, variables, wide, (3, 4))
  assert np.ptp(want) > 0.01
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_only_differences_of_positions_matter(variables, sampled):
  """A constant of its own is added to each row."""
  shift = jnp.asarray([0, 1, 17, 40, 5, 3])[:, None, None]
  moved = PROMPTS._replace(positions=PROMPTS.positions + shift)
  got = sampler()(variables, moved, jax.random.key(0))
  np.testing.assert_array_equal(got.batch.tokens, sampled.batch.tokens)
  np.testing.assert_allclose(got.logps, sampled.logps, atol=2e-4)
  real = np.asarray(got.batch.mask)
  added = (got.batch.positions - sampled.batch.positions)[real]
  rows = jnp.broadcast_to(jnp.repeat(shift[:, 0], SAMPLES, axis=0), real.shape)
  np.testing.assert_array_equal(added, np.repeat(rows[real][:, None], 3, axis=1))
