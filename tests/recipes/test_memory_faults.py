"""Exhausted memory in the real runner: message, exit code and the next start."""

import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest

from tests.faults import pipeline
from tests.training import test_loop as toy
from vlmrlaif_jax.core.errors import EXIT_USER_ERROR, list_places
from vlmrlaif_jax.core.profiling import PhaseTimer
from vlmrlaif_jax.recipes import machine_faults, memory_faults, runner
from vlmrlaif_jax.training.job import Hooks


def fill_arrays():
  jnp.zeros(2**45).block_until_ready()


def fill_numpy():
  np.zeros(2**50)


def fill_bytes():
  bytearray(2**62)


def fail_to_map():
  raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def start(root, **settings):
  """Runs the toy recipe; returns (exit code, message)."""
  try:
    runner.run_recipe(pipeline.config(**settings), str(root))
  except Exception as error:
    return machine_faults.describe_failure(error, root)[::-1]
  return 0, ""


@pytest.mark.parametrize("fill", [fill_arrays, fill_numpy, fill_bytes, fail_to_map])
def test_exhausted_memory_names_the_stage_the_use_and_the_remedy(
  tmp_path, monkeypatch, fill
):
  def train(run, stage, folder, log):
    if stage == "ppo":
      with PhaseTimer()("update"):
        fill()
    return pipeline.train(run, stage, folder, log)

  pipeline.install(monkeypatch, {**pipeline.PARTS, "ppo": train})
  held = jnp.zeros((77, 1 << 16))  # Listed as the largest array.
  code, message = start(tmp_path / "run", ppo__microbatches=2)
  assert code == EXIT_USER_ERROR and "\n" not in message
  assert message.startswith("ppo, the phase 'update': the memory of the host is exhaus")
  assert f" x float32{list(held.shape)}" in message and "This process holds" in message
  assert "raise --config.ppo.microbatches (2)" in message
  assert "The same command fails again" in message
  assert not (tmp_path / "run" / "ppo" / "done.json").exists()

  pipeline.install(monkeypatch)
  runner.run_recipe(pipeline.config(), str(tmp_path / "whole"))
  assert start(tmp_path / "run", ppo__microbatches=4) == (0, "")
  assert read(tmp_path / "run") == read(tmp_path / "whole")


def read(root):
  results = pipeline.read_results(root)
  return {name: x for name, x in results.items() if name != "config.json"}


def test_exhausted_memory_of_a_device_names_devices_as_a_remedy(monkeypatch):
  monkeypatch.setattr(memory_faults, "is_host_error", lambda error: False)
  config = pipeline.config(model__remat="none")
  with pytest.raises(memory_faults.OutOfMemoryError) as failed:
    with memory_faults.explain_exhaustion(config, "label"):
      fill_arrays()
  message = str(failed.value)
  assert "the memory of the device is exhausted (RESOURCE_EXHAUSTED: Out of" in message
  assert "--config.model.remat=full" in message and "--config.mesh.fsdp" in message
  assert f"lower --config.label.batch ({config.label.batch})" in message


@pytest.mark.parametrize(
  "error",
  [ValueError("shapes differ"), ValueError("RESOURCE_EXHAUSTED: error of writing x")],
)
def test_other_errors_pass(error):
  with pytest.raises(ValueError, match="shapes|writing") as failed:
    with memory_faults.explain_exhaustion(pipeline.config(), "ppo"):
      raise error
  assert failed.value is error


def test_the_loop_names_its_step_and_phase(tmp_path):
  def after_step(step, batch, info):
    if step == 2:
      fill_numpy()
    return {}

  with pytest.raises(MemoryError) as failed:
    toy.run(tmp_path, hooks=Hooks(after_step=after_step))
  assert list_places(failed.value) == ["step 3 of 5", "the phase 'log'"]


def test_memory_that_is_exhausted_outside_of_stages_is_one_line(tmp_path):
  line, code = machine_faults.describe_failure(MemoryError(), tmp_path)
  assert code == EXIT_USER_ERROR and "the memory of the host is exhausted" in line
