"""Four virtual CPU devices for every test, so that sharding can be tested."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Of XLA's two ways to write CPU code the one that compiles in a third of the time.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=4 --xla_cpu_use_fusion_emitters=false"
)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Tests compile much and compute little: half of their time would go to optimising.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import pytest  # noqa: E402

# The imports of `small` take a while, and many tests do without it.


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
  """See small.write_checkpoint; made once for all tests, which leave it as it is."""
  from tests.helpers import small

  return small.write_checkpoint(tmp_path_factory.mktemp("shared") / "llava")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
  """See small.write_world."""
  from tests.helpers import small

  return small.write_world(tmp_path_factory.mktemp("shared") / "world")


@pytest.fixture(scope="session")
def tiny_settings(tiny_checkpoint, tiny_world):
  """See small.settings."""
  from tests.helpers import small

  return small.settings(tiny_checkpoint, tiny_world)


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
  """What takes long to compile is compiled once, whichever test asks for it."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  folder = tmp_path_factory.mktemp("shared") / ".jax_cache"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  compilation_cache.reset_cache()  # It may have settled for none.
  return folder


@pytest.fixture(scope="session")
def one(tiny_settings, tmp_path_factory, compiled_once):
  """See stages.started; stages that are run in it stay there."""
  from tests.helpers import stage_runs

  return stage_runs.started(tiny_settings, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def ppo_on_one(one):
  """The stage "ppo" of `one`, after a step."""
  from tests.helpers import stage_runs
  from vlmrlaif_jax.stages.training import ppo

  return stage_runs.run_stage(one, "ppo", ppo.train)
