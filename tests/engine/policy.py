"""A policy with random LoRA factors, and prompts that its sampler takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.rows import text_batch
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.stages.training import rollout_settings, server_sampler

RANK, SAMPLES, NEW, STOPS, PAD = 4, 4, 12, (2,), 0
TINY = run_lib.resolve_checkpoint("builtin:tiny")
ROWS = [[20, 21, 22, 23], [30], [40, 41], [50, 51, 52]]


@functools.cache
def load():
  """The shipped model with random LoRA factors: trained and frozen parameters."""
  model, variables, _ = convert.load_checkpoint(TINY, dtype="float32")
  model = model.clone(llm=model.llm.clone(rank=RANK, alpha=8.0))
  shapes = jax.eval_shape(model.init, jax.random.key(0), prompts(model))["lora"]
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noise = [
    0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
  ]
  params = {"policy": {"lora": jax.tree.unflatten(tree, noise)}}
  return model, params, {"policy": variables, "ref": variables}


def prompts(model):
  """Videos of two frames with short texts, padded on the left."""
  features = 2 + model.vision.feature_shape[-2]
  start = 1 + features + 4
  tokens = np.full((len(ROWS), start), PAD)
  for i, row in enumerate(ROWS):
    row = [1, *[VIDEO_TOKEN] * features, *row]
    tokens[i, -len(row) :] = row
  mask = jnp.asarray(tokens != PAD)
  pixels = np.random.default_rng(0).integers(0, 256, (len(ROWS), 2, 32, 32, 3))
  return text_batch(
    jnp.asarray(pixels, jnp.uint8), jnp.asarray(tokens, jnp.int32), mask, mask & False
  )


def settings_of(model, **values):
  """Settings of sampling, with some values in place of the usual ones."""
  given = dict(temperature=1.0, top_p=1.0, top_k=0, samples=SAMPLES)
  fixed = dict(max_new=NEW, stops=STOPS, pad=PAD, vocab=model.llm.vocab - 4)
  return server_sampler.ServerSettings(**{**given, **fixed, **values})


def make_sampler(folder, *urls, values=(), **config):
  """The sampler of some servers."""
  settings = rollout_settings.default_config()
  settings.update(engine="vllm", urls=urls, **config)
  model = load()[0]
  return server_sampler.ServerSampler(
    settings, model, settings_of(model, **dict(values)), folder / "adapters"
  )


def sample(sampler, seed=0):
  """The responses of a rollout."""
  model, params, frozen = load()
  return sampler.finish(
    sampler.begin(jax.random.key(seed), params, frozen, prompts(model))
  )
