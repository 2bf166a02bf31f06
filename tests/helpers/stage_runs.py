"""Runs of single stages, for the tests of what stages are made of."""

import functools
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import small
from tests.methods.roles import noisy
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params, TrainState
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.runtime.arrays import get_trainable_shapes
from vlmrlaif_jax.stages.stage import get_stage
from vlmrlaif_jax.training import checkpoint, loop


def run_on(settings, workdir, devices, **mesh):
  """A run on the first so many devices; models, data and features as a user's."""
  made = small.config(
    settings, sft__short_steps=1, sft__optimizer__schedule="constant", ppo__steps=1,
    ppo__batch_size=8, ppo__minibatches=2, ppo__optimizer__learning_rate=1e-4,
  )  # fmt: skip
  made.mesh.update(mesh)
  with pytest.MonkeyPatch.context() as patch:
    here = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
    patch.setattr(loading.sharding, "make_mesh", here)
    return loading.create_run(made, workdir, note=lambda text: None)


def started(settings, workdir):
  """A run on one device, with an SFT policy and a reward model of random weights."""
  run = run_on(settings, workdir, 1, data=1, fsdp=1, tensor=1)
  save(run, "sft_long", {"policy": noisy(role_params.init_policy(run), 1, 0.05)})
  save(run, "rm", {"reward": noisy(role_params.init_reward_model(run), 2, 0.05)})
  return run


def untrained_policy(run):
  """LoRA as the stages after SFT have it, and the projector of the base."""
  shapes = get_trainable_shapes(run.policy, run.mesh)
  lora = run.arrays.initialize(shapes, jax.random.key(0))["lora"]
  return {**role_params.init_policy(run), "lora": lora}


def untrained_lora(run):
  return {"lora": untrained_policy(run)["lora"]}


def save(run, stage, params):
  state = TrainState(jnp.int32(1), params, jnp.zeros(1))
  checkpoint.save_train_state(
    str(run.workdir / stage / "checkpoints"), state, 1, keep=1
  )


class Trained(NamedTuple):
  """What a stage gave to the loop and got from it."""

  start: Params  # NumPy.
  state: TrainState
  summary: dict


def run_stage(run, stage, folder=None) -> Trained:
  """Runs a stage that trains, in the folder of its name or in another."""
  seen = []
  real = loop.run_training

  def spy(job, update, state, samplers, **given):
    start = jax.device_get(state.params)  # What is given is donated.
    seen.extend([start, real(job, update, state, samplers, **given)])
    return seen[1]

  folder = run.workdir / stage if folder is None else folder
  step = checkpoint.get_latest_step(str(folder / "checkpoints"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "run_training", spy)
    with StageLog(folder, stage, 1, resume_from=step, stream=io.StringIO()) as log:
      summary = get_stage(stage).run(run, stage, folder, log)
  return Trained(*seen, summary)
