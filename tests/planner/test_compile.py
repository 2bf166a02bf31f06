"""Real compilers for accelerators that are not there, on models of two layers."""

import jax
import pytest

from configs import prices
from tests.helpers import small
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch, MethodModels, ignore_phase
from vlmrlaif_jax.methods import grpo
from vlmrlaif_jax.planner import compile as compile_lib
from vlmrlaif_jax.planner import plan, topologies
from vlmrlaif_jax.runtime import specs
from vlmrlaif_jax.sampling.generate import SampledResponses

pytestmark = pytest.mark.compilers
MESH = dict(mesh__data=1, mesh__fsdp=2, mesh__tensor=2)


@pytest.fixture(scope="module")
def planned(tiny_settings, tmp_path_factory):
  """(topology, stages, settings) -> rows of plan.plan; compiled once."""
  cache = tmp_path_factory.mktemp("plan")

  def plan_it(name, stages, **more):
    topology = topologies.parse_topology(name)
    config = small.config(tiny_settings, **MESH, **more)
    config.grpo.update(batch_size=4, samples=2)
    with pytest.MonkeyPatch.context() as patch:
      for key, value in topologies.make_environment(topology).items():
        patch.setenv(key, value)
      to = plan.make_target(name, prices.get_config())
      return plan.plan_recipe(config, to, stages, cache, note=lambda line: None)

  return plan_it


@pytest.mark.parametrize("name", ["v5e-4", "h200-4"])
def test_sft_compiles_for_an_accelerator_that_is_not_there(planned, name):
  (row,) = planned(name, ["sft_short"])
  assert row["fits"] and row["step_s"] > 0
  update = row["functions"][-1]
  assert 0 < sum(update["weights"].values()) < update["peak"] < update["limit"]
  assert any(c["kind"] == "all-reduce" for c in update["collectives"])


@pytest.mark.parametrize("name", ["v5e-4"])
def test_groups_of_eight_are_compared_on_a_tpu(name, monkeypatch):
  """libtpu aborts, and the process with it, on some fusions of their masks."""
  topology = topologies.parse_topology(name)
  for key, value in topologies.make_environment(topology).items():
    monkeypatch.setenv(key, value)
  mesh = sharding.make_mesh(1, 4, 1, devices=topologies.get_topology_devices(topology))
  forward = lambda policy, variables, groups, **how: (
    (groups.tokens * variables["x"],) * 2
  )
  monkeypatch.setattr(grpo, "compute_group_logps", forward)
  config, rows = grpo.default_config(), 4 * 4 * 8
  config.update(samples=8, advantage="oracle_ndcg", kl_coef=0.04)
  shapes = (
    *(((4,), "float16"), ((192,), "int32"), ((192,), "bool"), ((192,), "bool")),
    ((192, 1), "int32"),
    *(((192,), "float32"), ((), "float32"), ((), "bool")),
  )
  made = [jax.ShapeDtypeStruct((rows, *rest), kind) for rest, kind in shapes]
  *batch, logps, scores, valid = specs.row_specs(made, mesh)

  def weigh(sampled, scores, valid):
    parts = MethodModels(score=lambda frozen, batch: (scores, valid))
    method = grpo.make(config, parts, max_new=128, stops=(2,), pad=0, vocab=9)
    frozen = {"policy": {"x": 1.0}, "ref": {"x": 0.5}}
    return method.collect.finish({"policy": {}}, frozen, sampled, ignore_phase)

  with jax.set_mesh(mesh):
    lowered = jax.jit(weigh).lower(
      SampledResponses(Batch(*batch), logps), scores, valid
    )
    assert lowered.compile().memory_analysis().peak_memory_in_bytes > 0


def test_without_cudnn_it_says_what_to_install(planned, monkeypatch):
  def missing(*args):
    raise RuntimeError("cuDNN not found.")

  monkeypatch.setattr(compile_lib, "compile_program", missing)
  with pytest.raises(ImportError, match=r"pip install .*\[plan-gpu\]"):
    planned("v5e-4", ["sft_short"])


@pytest.mark.parametrize("name", ["v5p-64"])
def test_any_mesh_can_be_laid_over_a_torus(name):
  devices = topologies.get_topology_devices(topologies.parse_topology(name))
  mesh = sharding.make_mesh(4, 2, 1, 4, devices)  # Of a torus of 2 x 4 x 4.
  assert mesh.shape == dict(data=4, fsdp=2, context=1, tensor=4)
