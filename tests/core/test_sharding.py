"""Where arrays live. conftest.py makes four virtual devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import small
from tests.methods import roles
from tests.models.ops.test_attention import interpret
from vlmrlaif_jax.core.sharding import (
  BATCH_SPEC,
  format_key_path,
  local_row_shards,
  make_mesh,
  num_batch_shards,
  process_row_indices,
  replicate,
  shard_batch,
  shard_by_rules,
)
from vlmrlaif_jax.core.types import MethodModels
from vlmrlaif_jax.methods import ppo, sft
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.planner import topologies
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.runtime import loading
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import get_stage
from vlmrlaif_jax.training.update import init_state, make_update

RULES = (
  ("embed", P(None, ("fsdp", "tensor"))),
  ("q/kernel", P("fsdp", "tensor")),
  ("kernel", P("tensor", "fsdp")),
  ("bias", P()),
)
PARAMS = {
  "embed": jnp.zeros((3, 8)),
  "q": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)},
  "o": {"kernel": jnp.zeros((6, 4))},
}


def mesh_of(**sizes):
  return make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes})


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ((), (1, 4, 1, 1)),
    ((2, 2, 1, 1), (2, 2, 1, 1)),
    ((-1, 2, 1, 1), (2, 2, 1, 1)),
    ((1, 2, 1, -1), (1, 2, 1, 2)),
    ((2, -1, 1, 2), (2, 1, 1, 2)),
    ((1, -1, 2, 1), (1, 2, 2, 1)),
  ],
)
def test_mesh_takes_all_devices(sizes, shape):
  mesh = make_mesh(*sizes)
  assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
  assert mesh.axis_sizes == shape


def test_mesh_may_be_of_given_devices():
  devices = jax.devices()[2:]
  assert set(make_mesh(devices=devices).devices.flat) == set(devices)


@pytest.mark.parametrize(
  "sizes",
  [
    *((1, 3, 1, 1), (1, 2, 1, 1), (1, -1, 1, 3), (1, -1, 3, 1)),
    *((-1, -1, 1, 1), (0, -1, 1, 1), (8, -1, 1, 1)),
  ],
)
def test_mesh_that_does_not_fit_is_refused(sizes):
  with pytest.raises(ValueError, match="does not fit 4 devices: let the product"):
    make_mesh(*sizes)


def test_mesh_allows_a_plain_embedding_lookup():
  mesh = mesh_of(fsdp=2, tensor=2)
  table = jax.device_put(
    jnp.eye(8), jax.sharding.NamedSharding(mesh, P("fsdp", "tensor"))
  )
  row = jax.jit(lambda table, i: table[i])(table, shard_batch(np.arange(8)[::-1], mesh))
  np.testing.assert_array_equal(row, np.eye(8)[::-1])


def test_path_of_names_dicts_tuples_and_namedtuples_alike():
  state = init_state({"a": {"b": jnp.zeros(2)}}, optax.chain(optax.adam(0.1)))
  paths = [
    format_key_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)
  ]
  assert "params/a/b" in paths
  assert "opt_state/0/0/mu/a/b" in paths


def test_rules_give_the_first_that_matches():
  shardings = shard_by_rules(PARAMS, RULES, mesh_of(fsdp=2, tensor=2))
  specs = jax.tree.map(lambda x: x.spec, shardings)
  assert specs == {
    "embed": P(None, ("fsdp", "tensor")),
    "q": {"kernel": P("fsdp", "tensor"), "bias": P()},
    "o": {"kernel": P("tensor", "fsdp")},
  }


def test_rules_of_params_serve_the_optimiser_state():
  abstract = jax.eval_shape(lambda p: init_state(p, optax.adamw(0.1)), PARAMS)
  shardings = shard_by_rules(abstract, RULES, mesh_of(fsdp=2, tensor=2))
  adam = shardings.opt_state[0]
  assert adam.mu == adam.nu == shardings.params
  assert adam.count.spec == shardings.step.spec == P()


def test_rules_that_miss_a_leaf_are_refused():
  with pytest.raises(
    ValueError, match=r"no sharding rule matches q/bias of shape \(6,"
  ):
    shard_by_rules(PARAMS, RULES[:3], mesh_of(fsdp=4))


def test_rules_that_do_not_divide_a_leaf_are_refused():
  message = r"q/kernel of shape \(4, 6\): its axis of 6 .* tensor = 4 of mesh data=1"
  with pytest.raises(ValueError, match=message):
    shard_by_rules({"q": PARAMS["q"]}, RULES, mesh_of(tensor=4))


def test_rules_over_two_axes_must_divide_by_both():
  with pytest.raises(ValueError, match="axis of 6 .* by fsdp x tensor = 4"):
    shard_by_rules({"embed": jnp.zeros((2, 6))}, RULES, mesh_of(fsdp=2, tensor=2))


def test_rules_with_too_many_axes_are_refused():
  with pytest.raises(ValueError, match="rule of kernel has 2 axes"):
    shard_by_rules({"kernel": jnp.zeros(4)}, RULES, mesh_of(fsdp=4))


def test_axes_of_size_one_divide_everything():
  sharding = shard_by_rules({"kernel": jnp.zeros((3, 4))}, RULES, mesh_of(fsdp=4))
  assert sharding["kernel"].spec == P("tensor", "fsdp")


def test_put_spreads_rows_over_data_and_fsdp():
  batch = {"tokens": np.arange(8).reshape(4, 2), "mask": np.ones(4, bool)}
  placed = shard_batch(batch, mesh_of(data=2, fsdp=2))
  chex.assert_trees_all_equal(placed, batch)
  rows = [shard.data.tolist() for shard in placed["tokens"].addressable_shards]
  assert sorted(rows) == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]


def test_put_gives_the_devices_of_one_tensor_group_the_same_rows():
  placed = shard_batch(np.arange(4), mesh_of(fsdp=2, tensor=2))
  rows = sorted(shard.data.tolist() for shard in placed.addressable_shards)
  assert rows == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_put_gives_the_devices_of_one_context_group_whole_rows():
  placed = shard_batch(np.arange(8).reshape(2, 4), mesh_of(fsdp=2, context=2))
  rows = sorted(shard.data.tolist() for shard in placed.addressable_shards)
  assert rows == [[[0, 1, 2, 3]]] * 2 + [[[4, 5, 6, 7]]] * 2


def test_put_refuses_rows_that_do_not_spread():
  message = r"mask of shape \(6,\): .* by the 4 row shards .* data=2 fsdp=2 context=1"
  with pytest.raises(ValueError, match=message):
    shard_batch({"mask": np.ones(6)}, mesh_of(data=2, fsdp=2))


# Hosts of TPUs that are not there.

SLICES = ["v5e-16", "v5e-64", "v6e-16", "v5p-64", "tpu7x-64"]


def hosts_of(name, monkeypatch):
  """The devices of a slice, by the number of their process."""
  slice_ = topologies.parse_topology(name)
  for key, value in topologies.make_environment(slice_).items():
    monkeypatch.setenv(key, value)
  found = {}
  for device in topologies.get_topology_devices(slice_):
    found.setdefault(device.process_index, []).append(device)
  return found


@pytest.mark.parametrize("sizes", [{}, dict(data=2), dict(tensor=2), dict(tensor=8)])
@pytest.mark.compilers
@pytest.mark.parametrize("name", SLICES)
def test_each_host_of_a_slice_has_the_rows_of_its_chips(name, sizes, monkeypatch):
  hosts = hosts_of(name, monkeypatch)
  mesh = make_mesh(**sizes, devices=sum(hosts.values(), []))
  count = 2 * num_batch_shards(mesh)
  places = NamedSharding(mesh, BATCH_SPEC).devices_indices_map((count,))
  for process, devices in hosts.items():
    rows = {row for at in devices for row in range(count)[places[at][0]]}
    assert process_row_indices(mesh, process, count).tolist() == sorted(rows)


@pytest.mark.compilers
@pytest.mark.parametrize("name", SLICES)
def test_hosts_of_a_slice_share_out_the_rows_of_the_default_mesh(name, monkeypatch):
  hosts = hosts_of(name, monkeypatch)
  mesh = make_mesh(devices=sum(hosts.values(), []))
  shards = [local_row_shards(mesh, process) for process in hosts]
  assert sorted(sum(shards, [])) == list(range(mesh.size))
  assert {len(each) for each in shards} == {mesh.size // len(hosts)}
  # The point: they do not stand together.
  assert any(each[-1] - each[0] >= len(each) for each in shards)


@pytest.mark.compilers
@pytest.mark.parametrize("name", SLICES)
def test_each_host_of_a_slice_is_a_mesh_by_itself(name, monkeypatch):
  for devices in hosts_of(name, monkeypatch).values():
    assert set(make_mesh(devices=devices).devices.flat) == set(devices)


def test_rows_that_do_not_spread_are_refused():
  with pytest.raises(ValueError, match="6 rows do not divide by the 4 row shards"):
    process_row_indices(mesh_of(data=2, fsdp=2), 0, 6)


def test_replicate_puts_everything_everywhere():
  placed = replicate({"a": np.arange(3)}, mesh_of(fsdp=2, tensor=2))
  shards = [shard.data.tolist() for shard in placed["a"].addressable_shards]
  assert shards == [[0, 1, 2]] * 4


# Under the mesh. Where a kernel is, a shard_map must have found it.


def test_a_recipe_runs_its_stages_under_the_mesh(tmp_path, monkeypatch):
  mesh, seen = mesh_of(fsdp=2, tensor=2), []

  def stage(run, name, folder, log):
    seen.append(jax.sharding.get_abstract_mesh())
    return {}

  rest = [None] * (len(Run._fields) - 3)
  make = lambda config, root, watch: Run(config, root, mesh, *rest)._replace(splits=())
  only = get_stage("label")._replace(run=stage, total_steps=lambda run: 1)
  monkeypatch.setattr(runner, "get_stage", lambda name: only)
  monkeypatch.setattr(loading, "create_run", make)
  monkeypatch.setattr(runner.page, "write_report", lambda root: root)
  runner.run_recipe(small.config({}, ("label",)), str(tmp_path))
  assert seen == [mesh.abstract_mesh]


def with_splash(model):
  return model.clone(llm=model.llm.clone(attention="splash"))


@pytest.fixture
def under_the_mesh(monkeypatch):
  interpret(monkeypatch)
  with jax.set_mesh(mesh_of(fsdp=2, tensor=2)):
    yield


def shard_maps(function, *shapes):
  """How many stand in what a function traces to: one for each kernel, and one for
  what a scan over layers finds to be the same in all of them.
  """
  return str(jax.make_jaxpr(function)(*shapes)).count("shard_map[")


@pytest.fixture
def frozen(under_the_mesh):
  """Shapes of the variables of each role; the head makes no difference to them."""
  return vlm.get_variable_shapes(with_splash(roles.HEADED))


def test_an_update_keeps_its_kernels_under_the_mesh(frozen):
  tx = optax.adam(0.1)
  method = sft.make(sft.default_config(), MethodModels(policy=with_splash(roles.MODEL)))
  params = {"policy": {"lora": frozen["lora"]}}
  state = jax.eval_shape(lambda params: init_state(params, tx), params)
  update = make_update(method.loss, tx, microbatches=3)
  # Forwards, and backwards.
  assert shard_maps(update, state, {"policy": frozen}, roles.answered()) >= 2


def test_a_rollout_keeps_its_kernels_under_the_mesh(frozen):
  policy, critic = with_splash(roles.MODEL), with_splash(roles.HEADED)
  parts = MethodModels(policy=policy, critic=critic, score=roles.score)
  config = ppo.default_config()
  config.kl_coef = 0.1
  method = ppo.make(
    config, parts, max_new=roles.NEW, stops=(roles.EOS,), pad=0, vocab=8
  )
  params = {"policy": {"lora": frozen["lora"]}, "critic": {"lora": frozen["lora"]}}
  of_roles = dict.fromkeys(("policy", "critic", "ref"), frozen)
  prompts = roles.prompts()
  count = shard_maps(method.collect, jax.random.key(0), params, of_roles, prompts)
  assert count >= 4  # Of the prompt, of the policy, of its reference, of the critic.


def test_encoding_needs_no_kernel_under_the_mesh(frozen):
  encode = lambda base, pixels: roles.MODEL.apply(base, pixels, method="encode")
  assert shard_maps(encode, frozen, roles.video()) == 0
