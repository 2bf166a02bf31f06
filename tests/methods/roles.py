"""A tiny model in every role, and something to learn for every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.rows import text_batch
from vlmrlaif_jax.core.types import (
  VIDEO_TOKEN,
  ComparedPairs,
  MethodModels,
  group_rows,
  merge_params,
)
from vlmrlaif_jax.methods import dpo, grpo, ppo
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.projector import Projector

EOS, PAD, NEW = 5, 0, 7  # NEW: the longest response.
VOCAB = 8  # Ids from here on are not sampled: so few that some responses end early.
ROWS = 6
START = 22  # The response's first index: 1 + 18 video tokens + 3.
FRAMES, FEATURES = 2, 18

TOWER = clip.VisionTower(**clip.VARIANTS["tiny"])
MODEL = vlm.VLM(TOWER, Projector(32), llama.Model(**llama.VARIANTS["tiny"], rank=4))
HEADED = MODEL.clone(scalar_head=True)


# Values for settings that have no default.
REQUIRED = {
  grpo: dict(samples=5, advantage="oracle_ndcg", kl_coef=0.04),
  ppo: dict(kl_coef=0.1),
}


def config_of(method, **settings):
  """The settings of a method's module."""
  config = method.default_config()
  config.update({**REQUIRED.get(method, {}), **settings})
  return config


def score(frozen, batch):
  """The share of even tokens; of every third row there is no score."""
  even = jnp.sum(batch.tokens % 2 == 0, axis=1, where=batch.loss_mask)
  valid = jnp.arange(len(even)) % 3 != 0
  return jnp.where(valid, even / jnp.sum(batch.loss_mask, axis=1), jnp.nan), valid


def score_all(frozen, batch):
  """The share of even tokens."""
  even = jnp.sum(batch.tokens % 2 == 0, axis=1, where=batch.loss_mask)
  return even / jnp.sum(batch.loss_mask, axis=1), jnp.ones(len(even), bool)


PARTS = MethodModels(
  policy=MODEL, critic=HEADED, reward_model=HEADED, score=jax.jit(score)
)


def video(seed=0):
  shape = (ROWS, FRAMES, 16, 16, 3)
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def prompts():
  """Of one to three words after the video, padded on the left."""
  tokens = np.full((ROWS, START), PAD)
  for i in range(ROWS):
    row = [1, *[VIDEO_TOKEN] * FEATURES, *range(5, 6 + i % 3)]
    tokens[i, -len(row) :] = row
  mask = jnp.asarray(tokens != PAD)
  return text_batch(video(), jnp.asarray(tokens, jnp.int32), mask, mask & False)


def answered(seed=0):
  """The prompts with responses of unequal lengths, padded on the right."""
  rng = np.random.default_rng(seed)
  batch = prompts()
  said = rng.integers(9, 60, (ROWS, NEW))  # None is EOS.
  length = rng.permutation(np.arange(ROWS) + 1)[:, None]
  kept = np.arange(NEW) < length
  tokens = np.concatenate([batch.tokens, np.where(kept, said, PAD)], axis=1)
  loss_mask = np.concatenate([np.zeros((ROWS, START), bool), kept], axis=1)
  mask = np.concatenate([batch.mask, kept], axis=1)
  return text_batch(
    batch.video, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask),
    jnp.asarray(loss_mask),
  )  # fmt: skip


def sides():
  """The chosen answers, and the rejected ones."""
  return answered(0), answered(1)


def pairs():
  """The same as groups."""
  rows = lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:])
  return group_rows(jax.tree.map(rows, *sides()), group=2, start=START)


def compared_pairs():
  """The pairs, and what the reference thinks of them."""
  _, frozen = roles()
  ref_logps = dpo.compute_pair_logps(
    dpo.default_config(), MODEL, frozen["ref"], pairs()
  )
  return ComparedPairs(pairs(), ref_logps)


@jax.jit
def noisy(tree, seed, scale=0.1):
  """LoRA starts as no change, and a method must not depend on that."""
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  moved = [
    x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(treedef, moved)


@functools.cache
def roles():
  """(params, frozen): every role, each trained one with weights of its own."""
  variables = jax.jit(HEADED.init)(jax.random.key(0), prompts())
  # Larger than at the start of training, so that responses differ.
  lora = jax.tree.map(lambda x: 6**0.5 * x, variables["lora"])
  variables = {"params": variables["params"], "lora": noisy(lora, 1)}
  head = variables["params"].pop("head")
  base, lora = {"params": noisy(variables["params"], 2, 0.05)}, variables["lora"]
  scorer = lambda seed: {
    "lora": noisy(lora, seed), "params": {"head": noisy(head, seed)}
  }  # fmt: skip
  params = {"policy": {"lora": lora}, "critic": scorer(3), "reward": scorer(4)}
  frozen = {
    "policy": base, "critic": base, "reward": base,
    "ref": merge_params(base, {"lora": noisy(lora, 5, 0.05)}),
  }  # fmt: skip
  return params, frozen
