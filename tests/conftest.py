"""Four virtual CPU devices for every test, so that sharding can be tested."""

import gc
import importlib.metadata
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=4 --xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
  # Of XLA's two ways to write CPU code the one that compiles in a third of the time.
  # From 0.12 on the flag is unknown, and ends the process.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Tests compile much and compute little: half of their time would go to optimising.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# A program is compiled once for all workers, all processes that tests start, and the
# next run. Keys are hashes of programs, so code that has changed is compiled again.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import pytest

from tests.helpers import (
  compilers,
  processor_oracle,
  real_model,
  tiers,
  vllm_server,
)

# The imports of `small` take a while, and many tests do without it.

# Tracing makes many objects that live long: the collector took 7 % of the suite's time.
gc.set_threshold(200_000, 50, 100)


def pytest_configure(config):
  """Ends a run in CI that could not run all tests."""
  absent = compilers.missing() + processor_oracle.missing()
  if (
    config.option.markexpr == "real_model"
  ):  # CI runs these tests in a stage of theirs.
    absent += real_model.missing()
  if config.option.markexpr == "engine":
    absent += vllm_server.missing()
  compilers.check(absent, os.environ)


@pytest.hookimpl(tryfirst=True)  # Before `-m` selects.
def pytest_collection_modifyitems(config, items):
  """Marks the fast tier; deselects tests of what is not installed."""
  tiers.mark(items)
  for marker, absent in (
    ("compilers", compilers.missing()),
    ("torchvision", processor_oracle.missing()),
    ("real_model", real_model.missing()),
    ("engine", vllm_server.missing()),
    ("faults", [] if "faults" in config.option.markexpr else ["-m faults"]),
  ):
    items[:], deselected = compilers.split(items, absent, marker)
    config.hook.pytest_deselected(items=deselected)


def pytest_collection_finish():
  """Exempts what was imported from collection, which takes most of a second of it."""
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module():
  """Frees the programs of a module after its tests: a worker would hold gigabytes."""
  yield
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()
    gc.collect()


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


@pytest.fixture(scope="module")
def http_server():
  """A server of this machine that answers several requests concurrently."""
  from pytest_httpserver import HTTPServer

  with HTTPServer("127.0.0.1", threaded=True) as started:
    yield started


@pytest.fixture(scope="session")
def tok():
  """A tokenizer of the embedded world, from few texts: the shipped one takes longer."""
  from tools.pretraining import tokenizer

  return tokenizer.train(tokenizer.generate_texts(0, scenes=40), vocab=500)


@pytest.fixture(scope="session")
def tiny_settings(tiny_checkpoint, tiny_world):
  """See small.settings."""
  from tests.helpers import small

  return small.settings(tiny_checkpoint, tiny_world)


@pytest.fixture(scope="session")
def one(tiny_settings, tmp_path_factory):
  """See stage_runs.started; stages that are run in it stay there."""
  from tests.helpers import stage_runs

  return stage_runs.started(tiny_settings, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def ppo_on_one(one):
  """The stage "ppo" of `one`, after a step."""
  from tests.helpers import stage_runs

  return stage_runs.run_stage(one, "ppo")
