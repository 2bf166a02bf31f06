"""Saving and restoring a TrainState. conftest.py makes four virtual devices."""

import os
import pathlib
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vlmrlaif_jax.core.sharding import make_mesh, shard_by_rules
from vlmrlaif_jax.core.types import TrainState
from vlmrlaif_jax.training.checkpoint import (
  get_latest_step,
  restore_checkpoint,
  restore_saved_params,
  save_train_state,
)
from vlmrlaif_jax.training.update import init_state

ROOT = pathlib.Path(__file__).parents[2]
RULES = [("kernel", P("fsdp", "tensor")), ("lora", P("fsdp")), ("", P())]


def state_of(seed):
  """A state after one step, so that the optimiser's moments are not zero."""
  rng = np.random.default_rng(seed)
  params = {
    "kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
    "lora": {"a": jnp.asarray(rng.normal(size=(8, 2)), jnp.bfloat16)},
    "bias": jnp.asarray(rng.normal(size=6), jnp.float32),
  }
  tx = optax.adamw(0.1)
  state = init_state(params, tx)
  updates, opt_state = tx.update(params, state.opt_state, params)
  return TrainState(jnp.array(seed), optax.apply_updates(params, updates), opt_state)


def zeros_like(state):
  return jax.tree.map(jnp.zeros_like, state)


def on_mesh(state, **sizes):
  mesh = make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes})
  return jax.device_put(state, shard_by_rules(state, RULES, mesh))


def save_steps(path, *steps, keep=10):
  for step in steps:
    save_train_state(path, state_of(step), step, keep=keep)


@pytest.fixture
def path(tmp_path):
  return str(tmp_path / "checkpoints")


def test_restored_state_is_bitwise_what_was_saved(path):
  save_train_state(path, state_of(3), 3, keep=1)
  state = restore_checkpoint(path, zeros_like(state_of(3)))
  chex.assert_trees_all_equal(state, state_of(3))
  chex.assert_trees_all_equal_shapes_and_dtypes(state, state_of(3))


def test_restored_state_is_on_the_mesh_asked_for(path):
  save_train_state(path, on_mesh(state_of(3), fsdp=4, tensor=1), 3, keep=1)
  like = on_mesh(zeros_like(state_of(3)), fsdp=2, tensor=2)
  state = restore_checkpoint(path, like)
  chex.assert_trees_all_equal(state, state_of(3))
  shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  assert shardings(state) == shardings(like)


def test_restore_needs_no_arrays_to_restore_into(path):
  save_steps(path, 3)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0)
  )
  chex.assert_trees_all_equal(restore_checkpoint(path, abstract), state_of(3))


def test_restore_takes_the_latest_step_or_the_one_asked_for(path):
  save_steps(path, 1, 2)
  assert restore_checkpoint(path, state_of(0)).step == 2
  assert restore_checkpoint(path, state_of(0), 1).step == 1


def test_restore_params_knows_no_optimiser(path):
  save_steps(path, 1, 2)
  like = zeros_like(state_of(0).params)
  chex.assert_trees_all_equal(restore_saved_params(path, like), state_of(2).params)
  chex.assert_trees_all_equal(restore_saved_params(path, like, 1), state_of(1).params)


def test_save_keeps_the_latest(path):
  save_steps(path, 1, 2, 3, keep=2)
  assert sorted(os.listdir(path)) == ["2", "3"]


def test_save_takes_a_relative_path(path, monkeypatch):
  monkeypatch.chdir(os.path.dirname(path))
  save_steps("here", 1)
  assert get_latest_step(os.path.join(os.path.dirname(path), "here")) == 1


def test_save_refuses_a_step_that_is_there(path):
  save_steps(path, 1)
  with pytest.raises(ValueError, match="already holds step 1: resume from it"):
    save_steps(path, 1)


def test_save_refuses_to_keep_nothing(path):
  with pytest.raises(ValueError, match="keep must be 1 or more checkpoints, not 0"):
    save_steps(path, 1, keep=0)


def test_latest_step_is_none_where_there_is_none(path):
  assert get_latest_step(path) is None
  os.mkdir(path)
  assert get_latest_step(path) is None


def test_latest_step_creates_nothing(path):
  get_latest_step(path)
  assert not os.path.exists(path)


def test_restore_of_nothing_names_the_path(path):
  with pytest.raises(FileNotFoundError, match=f"no checkpoint in {path}"):
    restore_checkpoint(path, state_of(0))


def test_restore_of_a_missing_step_names_those_there(path):
  save_steps(path, 1, 2)
  with pytest.raises(FileNotFoundError, match=r"no step 7 in .* steps \[1, 2\]"):
    restore_checkpoint(path, state_of(0), 7)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bias": jnp.zeros(5)}, r"params/bias: saved float32\[6\], required float32\[5\]"),
    ({"bias": jnp.zeros(6, int)}, r"params/bias: saved float32\[6\], required int32"),
    ({"new": jnp.zeros(5)}, r"params/new: saved none, required float32\[5\]"),
  ],
  ids=["shape", "dtype", "name"],
)
def test_restore_of_other_arrays_is_refused(path, change, message):
  save_steps(path, 1)
  like = state_of(0)
  with pytest.raises(ValueError, match=message):
    restore_checkpoint(path, like._replace(params={**like.params, **change}))


def test_of_params_those_are_read_that_are_asked_for(path):
  save_steps(path, 1)
  like = state_of(0).params
  asked = {"lora": like["lora"], "bias": like["bias"]}
  found = restore_saved_params(path, asked)
  wanted = state_of(1).params
  chex.assert_trees_all_equal(found, {name: wanted[name] for name in asked})
  with pytest.raises(ValueError, match="params/new: saved none"):
    restore_saved_params(path, {**asked, "new": like["bias"]})


def test_a_save_that_was_killed_leaves_the_step_before(path):
  # The last moment: everything is written, but for the rename that commits it.
  program = textwrap.dedent("""
    import os, signal, sys
    import jax.numpy as jnp
    from vlmrlaif_jax.training.checkpoint import save_train_state
    from vlmrlaif_jax.core.types import TrainState
    state = TrainState(jnp.array(0), {"w": jnp.ones(3)}, ())
    save_train_state(sys.argv[1], state, 1, keep=1)
    os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    save_train_state(sys.argv[1], state, 2, keep=1)
  """)
  command = [sys.executable, "-c", program, path]
  killed = subprocess.run(command, cwd=ROOT, capture_output=True)
  assert killed.returncode == -9
  left = [name for name in os.listdir(path) if name != "1"]
  assert len(left) == 1 and left[0].startswith("2.")  # Half a checkpoint.

  assert get_latest_step(path) == 1
  like = TrainState(jnp.array(0), {"w": jnp.zeros(3)}, ())
  state = restore_checkpoint(path, like)
  chex.assert_trees_all_equal(state.params, {"w": jnp.ones(3)})

  save_train_state(path, state, 3, keep=5)  # Another step: 2 would reuse what is left.
  assert sorted(os.listdir(path)) == ["1", "3"]
