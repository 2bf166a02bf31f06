"""A rollout and its update take a video's features as they are, encoded once."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from tests.methods import roles
from vlmrlaif_jax.models import clip

SAMPLING = dict(max_new=roles.NEW, stops=(roles.EOS,), pad=roles.PAD, vocab=roles.VOCAB)


class Encoded(Exception):
  pass


def trace(name, video):
  """Traces all that a step runs: sampling, scores, weighing, loss and its gradient."""
  module = importlib.import_module(f"vlmrlaif_jax.methods.{name}")
  parts = roles.PARTS._replace(score=roles.score_all)
  method = module.make(roles.config_of(module), parts, **SAMPLING)
  params, frozen = roles.roles()
  prompts = roles.prompts()._replace(video=video)
  rollout, _ = jax.eval_shape(
    method.collect, jax.random.key(0), params, frozen, prompts
  )
  jax.eval_shape(
    jax.grad(lambda params, rollout: method.loss(params, frozen, rollout).mean),
    params,
    rollout,
  )


@pytest.fixture
def no_tower(monkeypatch):
  roles.roles()  # Made with the tower.

  def encode(*args, **settings):
    raise Encoded

  monkeypatch.setattr(clip.VisionTower, "patches", encode)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_features_are_not_encoded_in_rollouts_or_updates(name, no_tower):
  tower = roles.TOWER
  shape = (roles.ROWS, roles.FRAMES, tower.patch_count, tower.embed)
  trace(name, jnp.zeros(shape, jnp.float16))


def test_pixels_would_be_encoded(no_tower):
  with pytest.raises(Encoded):
    trace("ppo", roles.video())
