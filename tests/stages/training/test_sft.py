"""The stages that train: alike on any mesh, on rows of one layout."""

import functools
import io
import json
import shutil

import chex
import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from tests.helpers import small
from tests.helpers.stage_runs import run_on, run_stage
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.stages.training import rm

# Weights are split twice, and rows once. Of several processes see test_hosts, which has
# rows of `data` too; of all meshes, test_meshes.
MESH = dict(data=1, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def elsewhere(one, tiny_settings, tmp_path_factory):
  """The same run on the mesh, from the same checkpoints."""
  workdir = tmp_path_factory.mktemp("mesh")
  for part in ("features", "sft_long", "rm"):
    shutil.copytree(one.workdir / part, workdir / part)
  return run_on(tiny_settings, workdir, 4, **MESH)


@pytest.fixture(scope="module")
def sft_on_one(one):
  return run_stage(one, "sft_short")


@pytest.fixture(scope="module")
def trained_elsewhere(elsewhere):
  return functools.cache(lambda stage: run_stage(elsewhere, stage))


# A mesh.


def test_sft_step_does_not_depend_on_the_mesh(sft_on_one, trained_elsewhere):
  there = trained_elsewhere("sft_short")
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


def test_ppo_step_does_not_depend_on_the_mesh(
  one, ppo_on_one, elsewhere, trained_elsewhere
):
  there = trained_elsewhere("ppo")
  said, said_there = samples(one), samples(elsewhere)
  assert [row["response"] for row in said_there] == [row["response"] for row in said]
  np.testing.assert_allclose(
    [row["advantage"] for row in said_there],
    [row["advantage"] for row in said],
    atol=1e-4,
  )
  # Adam's moments, not the weights: its quotient magnifies the rounding of a gradient
  # that is close to 0, as here of one weight of the first of two updates.
  got, want = (jax.device_get(s.opt_state) for s in (there.state, ppo_on_one.state))
  for moment in ("mu", "nu"):  # Each has a scale of its own, of each role.
    moments = [optax.tree_utils.tree_get(state, moment) for state in (got, want)]
    for role in ("policy", "critic"):
      here, one_device = (tree[role] for tree in moments)
      largest = max(np.abs(x).max() for x in jax.tree.leaves(one_device))
      assert largest > 0
      chex.assert_trees_all_close(here, one_device, rtol=0, atol=1e-3 * largest)


def samples(run):
  lines = (run.workdir / "ppo" / "samples" / "step_1.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stage", ["sft_short", "ppo"])
def test_optimiser_is_sharded_as_the_params_it_is_of(trained_elsewhere, stage):
  state = trained_elsewhere(stage).state
  leaves = lambda tree: [
    (sharding.format_key_path(path), leaf)
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
    jax.device_get(role_params.load_policy(one, "sft_short")),
    jax.device_get(sft_on_one.state.params["policy"]),
  )


def test_second_stage_of_sft_starts_from_the_first(one, sft_on_one, tmp_path):
  shutil.copytree(one.workdir / "sft_short", tmp_path / "sft_short")
  run = one._replace(workdir=tmp_path)
  second = run_stage(run, "sft_long")
  chex.assert_trees_all_equal(
    second.start["policy"], jax.device_get(sft_on_one.state.params["policy"])
  )


# What is measured while it trains.


def test_a_reward_model_is_measured_on_held_out_pairs_as_it_learns(one, tmp_path):
  config = ConfigDict(one.config)
  config.rm.update(steps=3, measure_every=2)
  run, folder = one._replace(config=config), tmp_path / "rm"
  with StageLog(folder, "rm", 3, stream=io.StringIO()) as log:
    rm.train(run, "rm", folder, log)
  lines = small.metrics(folder)
  assert ["held_out_accuracy" in line for line in lines] == [False, True, False]
  assert 0 <= lines[1]["held_out_accuracy"] <= 1
