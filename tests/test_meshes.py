"""One line changes the mesh, and nothing else: 20 steps of four stages on each.

Random weights and rows; what is trained, sampled and judged is as in a recipe.
"""

import functools
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import small
from tests.methods import roles
from vlmrlaif_jax import loop, sharding, update
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.methods import grpo, ppo, rm, sft
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.types import VIDEO_TOKEN, Batch, Pairs, Parts

STEPS, ROWS, PROMPT, NEW = 20, 8, 24, 8
SUFFIX = (9, 10, 11)  # The reward prompt, after which no context divides the length.
MESHES = {
  "data 4": dict(data=4, fsdp=1),
  "fsdp 4": dict(fsdp=4),
  "data 2, tensor 2": dict(data=2, fsdp=1, tensor=2),
  "fsdp 2, tensor 2": dict(fsdp=2, tensor=2),
  "context 4": dict(fsdp=1, context=4),
  "fsdp 2, context 2": dict(fsdp=2, context=2),
}


# Four stages, as their methods and what they read.


def rows(step, *, answered):
  """Prompts of one to three words behind a video; answered by some more, or not."""
  rng = np.random.default_rng(step)
  tokens = np.full((ROWS, PROMPT + NEW * answered), roles.PAD, np.int32)
  for row in tokens:
    asked = [1, *[VIDEO_TOKEN] * roles.FEATURES, *rng.integers(6, 60, rng.integers(1, 4))]
    row[PROMPT - len(asked) : PROMPT] = asked
    said = rng.integers(6, 60, rng.integers(1, NEW + 1) * answered)
    row[PROMPT : PROMPT + len(said)] = said
  mask = tokens != roles.PAD
  patches = roles.FEATURES - roles.FRAMES
  features = rng.normal(size=(ROWS, roles.FRAMES, patches, roles.TOWER.embed))
  learned = mask & (np.arange(tokens.shape[1]) >= PROMPT)
  return Batch(features.astype(np.float32), tokens, mask, learned)


def pairs(step):
  both = (rows(2 * step + i, answered=True) for i in range(2))
  return Pairs(*(rewards.with_suffix(batch, SUFFIX) for batch in both))


def methods():
  """Stage -> its method, and step -> rows. The oracle of GRPO_rank ranks by a rule."""
  rule = rewards.reward(
    roles.HEADED, suffix=SUFFIX, eos=roles.EOS, penalty=-1.0, length_coef=0.0, longest=NEW
  )
  sampling = dict(max_new=NEW, eos=roles.EOS, pad=roles.PAD, vocab=roles.VOCAB)
  ranked = grpo.default_config()
  ranked.samples = 4
  asked = functools.partial(rows, answered=False)
  parts = roles.PARTS._replace(score=rule)
  return {
    "sft": (sft.make(sft.default_config(), parts), functools.partial(rows, answered=True)),
    "rm": (rm.make(rm.default_config(), parts), pairs),
    "ppo": (ppo.make(ppo.default_config(), parts, **sampling), asked),
    "grpo_rank": (
      grpo.make(ranked, parts._replace(score=roles.score_all), **sampling),
      asked,
    ),
  }


TRAINED = {
  "sft": ("policy",),
  "rm": ("reward",),
  "ppo": ("policy", "critic"),
  "grpo_rank": ("policy",),
}


# What is compared.


class Curve(NamedTuple):
  """What a stage said of its steps, and which tokens it sampled."""

  metrics: list[dict[str, float]]
  tokens: list[np.ndarray]


def train(stage, mesh, folder):
  """A stage's 20 steps, as a recipe runs them: under the mesh."""
  method, data = methods()[stage]
  params, frozen = roles.roles()
  place = lambda tree: sharding.shard_by_rules(tree, vlm.SHARDING, mesh)
  put = lambda tree: jax.device_put(tree, place(tree))
  sampled = []

  def on_step(step, batch, info):
    if "tokens" in info:
      sampled.append(np.asarray(info["tokens"]))
    return loop.Told({}, {})

  optimizer = update.default_config()
  optimizer.update(learning_rate=3e-3)
  with (
    jax.set_mesh(mesh),
    Log(folder, stage, STEPS, stream=io.StringIO()) as log,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(loop.checkpoint, "save", lambda *given, **more: None)
    loop.fit(
      method=method,
      params=put({role: params[role] for role in TRAINED[stage]}),
      frozen=put(frozen | {"reward": {**frozen["reward"], **scorer(params)}}),
      data=lambda step: sharding.put(data(step), mesh),
      key=jax.random.key(1),
      plan=loop.Plan(STEPS, STEPS),
      optimizer=optimizer,
      place=place,
      folder=str(folder),
      log=log,
      hooks=loop.Hooks(on_step=on_step),
    )
  return Curve(small.metrics(folder), sampled)
