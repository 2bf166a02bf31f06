"""Few slots for many prompts: what is sampled is what `generate` samples without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import roles
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch
from vlmrlaif_jax.methods import _rollout, grpo, ppo
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.sampling.generate import generate

NEW, COUNT = 16, 24  # The longest response; prompts.


@pytest.fixture(scope="module")
def prompts():
  """Of one to three words, each after a video of its own."""
  some, rng = roles.prompts(), np.random.default_rng(0)
  columns = (jnp.concatenate([x] * (COUNT // roles.ROWS)) for x in some[1:])
  shape = (COUNT, roles.FRAMES, 16, 32)
  return Batch(jnp.asarray(rng.normal(size=shape), jnp.float32), *columns)


@pytest.fixture(scope="module")
def variables(prompts):
  variables = jax.jit(roles.MODEL.init)(jax.random.key(0), prompts)
  return roles.noisy(variables, 1, 0.05)


@functools.cache
def sampler(**settings):
  settings = (
    dict(
      max_new=NEW, temperature=1.0, stops=(roles.EOS,), pad=roles.PAD, vocab=roles.VOCAB
    )
    | settings
  )
  return jax.jit(functools.partial(generate, roles.MODEL, **settings))


def check_same(got, want, rows=slice(None)):
  """Tokens and masks to the bit; log-probabilities as far as float32 goes."""
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x[rows], y[rows]), got.batch, want.batch
  )
  np.testing.assert_allclose(got.logps[rows], want.logps[rows], rtol=1e-6, atol=1e-6)


def lengths(sampled):
  return np.asarray(sampled.batch.loss_mask.sum(axis=1))


@pytest.mark.parametrize("few", [dict(slots=5), dict(slots=16, samples=3)])
def test_slots_change_nothing_of_what_is_sampled(variables, prompts, few):
  key = jax.random.key(3)
  want = sampler(samples=few.get("samples", 1))(variables, prompts, key)
  assert lengths(want).min() < 3 and lengths(want).max() == NEW
  check_same(sampler(**few)(variables, prompts, key), want)


def test_slots_change_nothing_at_temperature_0(variables, prompts):
  key = jax.random.key(0)
  free = sampler(temperature=0.0, stops=(-5,))(variables, prompts, key)
  said = np.asarray(free.batch.tokens[:, -NEW:])
  # The id that the likeliest responses reach at the most different places.
  ends = {eos: np.cumsum(said == eos, axis=1) - (said == eos) == 0
          for eos in range(roles.VOCAB)}  # fmt: skip
  eos = max(ends, key=lambda eos: len(set(ends[eos].sum(axis=1))))
  assert len(set(ends[eos].sum(axis=1))) > 2
  got = sampler(temperature=0.0, stops=(eos,), slots=8)(variables, prompts, key)
  want = np.where(ends[eos], said, roles.PAD)
  np.testing.assert_array_equal(got.batch.tokens[:, -NEW:], want)


def test_a_prompt_without_a_token_gets_an_empty_response(variables, prompts):
  asks = np.arange(COUNT) % 3 != 1
  some = prompts._replace(mask=prompts.mask & asks[:, None])
  key = jax.random.key(3)
  want = sampler()(variables, prompts, key)
  for settings in ({}, dict(slots=5)):
    got = sampler(**settings)(variables, some, key)
    check_same(got, want, rows=asks)
    assert lengths(got)[~asks].max() == 0


def test_a_mesh_samples_what_one_device_samples(variables, prompts):
  key, settings = jax.random.key(3), dict(samples=3)
  want = sampler(**settings)(variables, prompts, key)
  mesh = sharding.make_mesh(data=2, fsdp=2)
  places = sharding.shard_by_rules(variables, vlm.SHARDING, mesh)
  with jax.set_mesh(mesh):  # Four shards of rows, with prompts and slots of their own.
    got = sampler(**settings, slots=16)(
      jax.device_put(variables, places), sharding.shard_batch(prompts, mesh), key
    )
  check_same(got, want)


def test_slots_that_the_samples_of_a_prompt_do_not_fit_are_refused(variables, prompts):
  with pytest.raises(ValueError, match="slots=4 for 24 prompts of 6 samples"):
    sampler(samples=6, slots=4)(variables, prompts, jax.random.key(0))


@pytest.mark.parametrize("module", [grpo, ppo])
def test_rollouts_are_sampled_in_as_many_slots_as_the_config_says(module, monkeypatch):
  seen = []
  real = _rollout.generate
  spy = lambda *given, **how: seen.append(how["slots"]) or real(*given, **how)
  monkeypatch.setattr(_rollout, "generate", spy)
  config = roles.config_of(module)
  assert config.slots == 0
  config.slots = 5
  lengths = dict(
    max_new=roles.NEW, stops=(roles.EOS,), pad=roles.PAD, vocab=roles.VOCAB
  )
  method = module.make(config, roles.PARTS, **lengths)
  jax.eval_shape(method.collect, jax.random.key(0), *roles.roles(), roles.prompts())
  assert seen == [5]
