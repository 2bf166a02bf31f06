"""The stages that train: alike on any mesh, on rows of one layout."""

import functools
import io
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.helpers import small
from tests.helpers.stage_runs import run_on, run_stage
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.stages.training import ppo, rm, rollouts, sft

MESHES = {
  "fsdp x tensor": dict(data=1, fsdp=2, tensor=2),
  "data x fsdp": dict(data=2, fsdp=2, tensor=1),
}


@pytest.fixture(scope="module")
def elsewhere(one, tiny_settings, tmp_path_factory):
  """The same run on other meshes, from the same checkpoints."""

  @functools.cache
  def make(name):
    workdir = tmp_path_factory.mktemp("mesh")
    for part in ("features", "sft_long", "rm"):
      shutil.copytree(one.workdir / part, workdir / part)
    return run_on(tiny_settings, workdir, 4, **MESHES[name])

  return make


@pytest.fixture(scope="module")
def sft_on_one(one):
  return run_stage(one, "sft_short", sft.train)


@pytest.fixture(scope="module")
def trained_elsewhere(elsewhere):
  return functools.cache(
    lambda mesh, stage: run_stage(
      elsewhere(mesh), stage, ppo.train if stage == "ppo" else sft.train
    )
  )


# Meshes.


@pytest.mark.parametrize("mesh", MESHES)
def test_sft_step_does_not_depend_on_the_mesh(sft_on_one, trained_elsewhere, mesh):
  there = trained_elsewhere(mesh, "sft_short")
  chex.assert_trees_all_close(
    jax.device_get(there.state.params),
    jax.device_get(sft_on_one.state.params),
    atol=1e-4,
  )
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(),
    jax.device_get(sft_on_one.state.params),
    sft_on_one.start,
  )
  assert max(jax.tree.leaves(moved)) > 5e-4  # Else there was nothing to compare.


@pytest.mark.parametrize("mesh", MESHES)
def test_ppo_step_does_not_depend_on_the_mesh(
  one, ppo_on_one, elsewhere, trained_elsewhere, mesh
):
  there = trained_elsewhere(mesh, "ppo")
  said, said_there = samples(one), samples(elsewhere(mesh))
  assert [row["response"] for row in said_there] == [row["response"] for row in said]
  np.testing.assert_allclose(
    [row["advantage"] for row in said_there],
    [row["advantage"] for row in said],
    atol=1e-4,
  )
  chex.assert_trees_all_close(
    jax.device_get(there.state.params),
    jax.device_get(ppo_on_one.state.params),
    atol=1e-4,
  )


def samples(run):
  lines = (run.workdir / "ppo" / "samples" / "step_1.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stage", ["sft_short", "ppo"])
@pytest.mark.parametrize("mesh", MESHES)
def test_optimiser_is_sharded_as_the_params_it_is_of(trained_elsewhere, mesh, stage):
  state = trained_elsewhere(mesh, stage).state
  leaves = lambda tree: [
    (sharding.path_of(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.ndim
  ]
  params, moments = leaves(state.params), leaves(state.opt_state)
  assert len(moments) == 2 * len(params)  # Adam's two.
  for name, moment in moments:
    (owner,) = (param for path, param in params if name.endswith(path))
    assert moment.sharding.is_equivalent_to(owner.sharding, moment.ndim), name
  assert any(not param.sharding.is_fully_replicated for _, param in params)


# What is trained, and what from.


def test_sft_trains_lora_and_projector_and_leaves_the_base(one, sft_on_one):
  assert set(sft_on_one.state.params["policy"]) == {"lora", "params"}
  assert set(sft_on_one.state.params["policy"]["params"]) == {"projector"}
  projector = one.base["params"]["projector"]  # Not donated.
  chex.assert_trees_all_equal(
    jax.device_get(projector), sft_on_one.start["policy"]["params"]["projector"]
  )


def test_sft_saves_what_it_ends_with(one, sft_on_one):
  chex.assert_trees_all_equal(
    jax.device_get(role_params.policy_of(one, "sft_short")),
    jax.device_get(sft_on_one.state.params["policy"]),
  )


def test_second_stage_of_sft_starts_from_the_first(one, sft_on_one, tmp_path):
  shutil.copytree(one.workdir / "sft_short", tmp_path / "sft_short")
  run = one._replace(workdir=tmp_path)
  second = run_stage(run, "sft_long", sft.train)
  chex.assert_trees_all_equal(
    second.start["policy"], jax.device_get(sft_on_one.state.params["policy"])
  )


# The KL coefficient.


def adapted(one, tmp_path, *, target, stop=None):
  """PPO's metrics and last extra, its coefficient led to a target KL."""
  workdir = tmp_path / "adapted"
  if not workdir.exists():
    for part in ("sft_long", "rm"):
      shutil.copytree(one.workdir / part, workdir / part)
  config = one.config.copy_and_resolve_references()
  config.ppo.update(steps=3, save_every=1)
  config.ppo.optimizer.learning_rate = 3e-2  # So that the policy soon moves.
  config.ppo.update(kl_target=target, kl_horizon=10.0, kl_coef=0.5)
  run = one._replace(workdir=workdir, config=config)
  with pytest.MonkeyPatch.context() as patch:
    if stop is not None:
      real = rollouts.read
      read = lambda *given: killed() if given[3] == stop else real(*given)
      patch.setattr(rollouts, "read", read)
    try:
      run_stage(run, "ppo", ppo.train)
    except Killed:
      pass
  path = workdir / "ppo" / "checkpoints"
  extra = json.loads(next(path.glob("*/extra/metadata")).read_text())
  return small.metrics(workdir / "ppo"), extra


class Killed(Exception):
  pass


def killed():
  raise Killed


def test_kl_coefficient_moves_towards_the_target(one, tmp_path):
  target = 1e-3
  lines, extra = adapted(one, tmp_path, target=target)
  coefs = [0.5, *(line["kl_coef"] for line in lines)]
  errors = [np.clip(line["kl"] / target - 1, -0.2, 0.2) for line in lines]
  want = [c * (1 + e * 8 / 10) for c, e in zip(coefs[:-1], errors, strict=True)]
  np.testing.assert_allclose(coefs[1:], want, rtol=1e-5)
  assert min(errors) < 0 < max(errors)  # Both ways were seen.
  assert extra == {"kl_coef": coefs[-1]}


def test_kl_coefficient_goes_on_where_a_killed_run_was(one, tmp_path):
  whole = adapted(one, tmp_path / "whole", target=1e-3)
  cut, extra = adapted(one, tmp_path / "cut", target=1e-3, stop=2)
  assert len(cut) == 2 and extra != {"kl_coef": 0.5}
  assert adapted(one, tmp_path / "cut", target=1e-3) == whole


# What is measured while it trains.


def test_a_reward_model_is_measured_on_held_out_pairs_as_it_learns(one, tmp_path):
  config = ConfigDict(one.config)
  config.rm.update(steps=3, measure_every=2)
  run, folder = one._replace(config=config), tmp_path / "rm"
  with Log(folder, "rm", 3, stream=io.StringIO()) as log:
    rm.train(run, "rm", folder, log)
  lines = small.metrics(folder)
  assert ["held_out_accuracy" in line for line in lines] == [False, True, False]
  assert 0 <= lines[1]["held_out_accuracy"] <= 1
