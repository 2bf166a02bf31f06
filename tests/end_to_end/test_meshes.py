"""One line changes the mesh, and nothing else: 20 steps of four stages.

Random weights and rows; what is trained, sampled and judged is as in a recipe.
"""

import functools
import io
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.helpers import small
from tests.helpers.rows import text_batch
from tests.methods import roles
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, group_rows, merge_params
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.methods import grpo, ppo, rm, sft
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.training import alarms, loop, update
from vlmrlaif_jax.training.job import Hooks, TrainingJob, TrainingSchedule

STEPS, ROWS, PROMPT, NEW = 20, 8, 24, 4
SUFFIX = (9, 10, 11)  # The reward prompt, after which no context divides the length.
MESHES = {
  "data 4": dict(data=4, fsdp=1),
  "fsdp 4": dict(fsdp=4),
  "data 2, tensor 2": dict(data=2, fsdp=1, tensor=2),
  "fsdp 2, tensor 2": dict(fsdp=2, tensor=2),
  "context 4": dict(fsdp=1, context=4),
  "fsdp 2, context 2": dict(fsdp=2, context=2),
}
# PPO does all that the others do, so it has every mesh; these two have every axis.
EVERY_AXIS = ("data 2, tensor 2", "fsdp 2, context 2")


# Four stages, as their methods and what they read.


def rows(step, *, answered):
  """Prompts of one to three words behind a video; answered by some more, or not."""
  rng = np.random.default_rng(step)
  tokens = np.full((ROWS, PROMPT + NEW * answered), roles.PAD, np.int32)
  for row in tokens:
    words = rng.integers(6, 60, rng.integers(1, 4))
    asked = [1, *[VIDEO_TOKEN] * roles.FEATURES, *words]
    row[PROMPT - len(asked) : PROMPT] = asked
    said = rng.integers(6, 60, rng.integers(1, NEW + 1) * answered)
    row[PROMPT : PROMPT + len(said)] = said
  mask = tokens != roles.PAD
  patches = roles.FEATURES - roles.FRAMES
  features = rng.normal(size=(ROWS, roles.FRAMES, patches, roles.TOWER.embed))
  learned = mask & (np.arange(tokens.shape[1]) >= PROMPT)
  return text_batch(features.astype(np.float32), tokens, mask, learned)


def pairs(step):
  """Prompts with their own answers, and with those of their neighbours."""
  own = rows(step, answered=True)
  answers = np.arange(PROMPT + NEW) >= PROMPT
  other = [np.where(answers, np.roll(x, 1, axis=0), x) for x in own[1:4]]
  other = text_batch(own.video, *other)
  each = (np.stack(x, axis=1) for x in zip(own, other, strict=True))
  both = Batch(*(x.reshape(-1, *x.shape[2:]) for x in each))
  return rewards.append_suffix(group_rows(both, group=2, start=PROMPT), SUFFIX)


def methods():
  """Stage -> its method, and step -> rows. The oracle of GRPO_rank ranks by a rule."""
  score = jax.jit(rewards.make_model_score(roles.HEADED, suffix=SUFFIX))
  sampling = dict(max_new=NEW, stops=(roles.EOS,), pad=roles.PAD, vocab=roles.VOCAB)
  ranked = roles.config_of(grpo, samples=4)
  asked, told = (functools.partial(rows, answered=on) for on in (False, True))
  parts = roles.PARTS._replace(score=score)
  return {
    "sft": (sft.make(sft.default_config(), parts), told),
    "rm": (rm.make(rm.default_config(), parts), pairs),
    "ppo": (ppo.make(roles.config_of(ppo), parts, **sampling), asked),
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
    return {}

  optimizer = update.default_config()
  optimizer.update(learning_rate=1e-3)
  with (
    jax.set_mesh(mesh),
    StageLog(folder, stage, STEPS, stream=io.StringIO()) as log,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(loop.checkpoint, "save_train_state", lambda *given, **more: None)
    job = TrainingJob(
      method=method,
      params=put({role: params[role] for role in TRAINED[stage]}),
      frozen=put(frozen | {"reward": merge_params(frozen["reward"], params["reward"])}),
      batch_spec=None,
      schedule=TrainingSchedule(STEPS, STEPS),
      optimizer=optimizer,
      passes={},
      alarms=alarms.default_config(),
      hooks=Hooks(after_step=on_step),
      data=lambda step: sharding.shard_batch(data(step), mesh),
    )
    key = jax.random.key(4)  # With others, the losses of a stage hardly differ.
    loop.fit_job(job, key=key, place=place, log=log)
  return Curve(small.metrics(folder), sampled)


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
  """(stage, mesh's name, or none for one device) -> its Curve; trained once."""

  @functools.cache
  def of(stage, name=None):
    one = dict(fsdp=1, devices=jax.devices()[:1])
    mesh = sharding.make_mesh(**MESHES[name] if name else one)
    return train(stage, mesh, tmp_path_factory.mktemp("curve"))

  return of


# Of a curve's scale: its largest loss, or 1, which advantages have before they cancel.
# float32 rounds by 1e-7; 20 steps of Adam have made up to 4e-6 of it, on any of these.
NOISE = 2e-5


CASES = [
  (stage, mesh)
  for stage in TRAINED
  for mesh in (MESHES if stage == "ppo" else EVERY_AXIS)
]
SAMPLED = [case for case in CASES if case[0] in ("ppo", "grpo_rank")]


@pytest.mark.parametrize(("stage", "mesh"), CASES)
def test_curves_do_not_depend_on_the_mesh(curve, stage, mesh):
  one, there = curve(stage), curve(stage, mesh)
  assert len(one.metrics) == STEPS
  want, got = (np.array([line["loss"] for line in c.metrics]) for c in (one, there))
  scale = max(np.abs(want).max(), 1)
  np.testing.assert_allclose(got, want, rtol=0, atol=NOISE * scale)
  assert np.ptp(want) > 1000 * NOISE * scale  # Else there was nothing to compare.


@pytest.mark.parametrize(("stage", "mesh"), SAMPLED)
def test_what_is_sampled_does_not_depend_on_the_mesh(curve, stage, mesh):
  """At temperature 1, in all 20 steps, each after an update of the step before.

  Keys follow from a row's number alone; so a token is another only where two logits,
  noise added, are as close as rounding: with this seed, none are.
  """
  one, there = curve(stage), curve(stage, mesh)
  assert len(one.tokens) == STEPS
  np.testing.assert_array_equal(there.tokens, one.tokens)
