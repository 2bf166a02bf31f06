import pytest

from configs import prices
from tests.helpers import small
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.planner import abstract_run, plan, topologies
from vlmrlaif_jax.planner import sweep as sweep_lib

CHIP = topologies.Chip(flops=1e11, memory=2e8, bandwidth=1e10, links=1e9, latency=1e-5)


@pytest.fixture
def config(tiny_settings):
  return small.config(tiny_settings, sft__batch_size=8, ppo__batch_size=8)


@pytest.fixture
def to():
  return plan.make_target("cpu-4", prices.get_config(), CHIP)


def sweep(config, to, tmp_path, monkeypatch, fits, excess=1.0, top=2):
  """SFT's, with a compiler that says of each way what `fits` does.

  Args:
    excess: how far the update's peak is beyond its estimate, by that compiler.
  """

  def compiled(config, to, stages, cache, note):
    mesh = sharding.make_mesh(**config.mesh, devices=to.devices)
    run = abstract_run.create_abstract_run(config, mesh)
    (stage,) = abstract_run.plan_recipe_stages(run, stages)
    row = plan.plan_stage(run, stage, to)
    seen.append(dict(config.mesh))
    update = row["functions"][-1]
    update.update(fits=fits(config), peak=excess * update["peak"])
    return [{**row, "fits": fits(config)}]

  seen = []
  monkeypatch.setattr(plan, "plan_recipe", compiled)
  rows = sweep_lib.sweep_meshes(
    config, to, "sft_short", tmp_path, top, lambda line: None
  )
  return rows, seen


def test_meshes_are_those_that_the_rows_spread_over(config):
  found = list(sweep_lib.list_meshes(config, "sft_short", 4))
  sizes = [(m["data"], m["fsdp"], m["tensor"]) for m in found]
  assert {(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1)} <= set(sizes)
  config.sft.batch_size = 2
  assert all(
    m["data"] * m["fsdp"] <= 2 for m in sweep_lib.list_meshes(config, "sft_short", 4)
  )


def test_microbatches_divide_the_rows_of_an_update(config):
  assert sweep_lib.list_microbatches(config, "sft_short", shards=2) == [1, 2, 4]
  assert sweep_lib.list_microbatches(config, "ppo", shards=1) == [
    1,
    2,
    4,
  ]  # 2 minibatches.
  assert sweep_lib.list_microbatches(config, "label", shards=1) == [0]


def test_the_fastest_that_fit_come_first_with_the_line_to_paste(
  config, to, tmp_path, monkeypatch
):
  rows, seen = sweep(config, to, tmp_path, monkeypatch, lambda c: c.mesh.fsdp < 4)
  assert len(rows) == 2 < len(seen) + 1
  assert rows[0]["step_s"] <= rows[1]["step_s"]
  assert all(row["mesh"]["fsdp"] < 4 for row in rows)
  flags = "--config.mesh.data={data} --config.mesh.fsdp={fsdp} "
  assert rows[0]["line"].startswith(flags.format(**rows[0]["mesh"]))
  assert rows[0]["line"] in sweep_lib.format_sweep(rows)


def test_of_a_mesh_that_fits_no_more_microbatches_are_tried(
  config, to, tmp_path, monkeypatch
):
  rows, _ = sweep(config, to, tmp_path, monkeypatch, lambda c: True, top=4)
  meshes = [tuple(row["mesh"].values()) for row in rows]
  assert len(rows) > 1 and len(set(meshes)) == len(rows)


def test_where_nothing_fits_the_nearest_is_told(config, to, tmp_path, monkeypatch):
  rows, seen = sweep(config, to, tmp_path, monkeypatch, lambda c: False)
  assert len(seen) == 12 and len(rows) == 1 and not rows[0]["fits"]
  assert "| NO |" in sweep_lib.format_sweep(rows)


def test_what_cannot_fit_is_not_compiled(config, to, tmp_path, monkeypatch):
  tight = to._replace(chip=CHIP._replace(memory=1e4))
  rows, seen = sweep(config, tight, tmp_path, monkeypatch, lambda c: True)
  assert not seen and not rows[0]["fits"]


def test_what_would_go_beyond_its_estimate_as_others_did_is_left_out(
  config, to, tmp_path, monkeypatch
):
  rows, seen = sweep(config, to, tmp_path, monkeypatch, lambda c: False, excess=1e4)
  assert len(seen) == 1 and not rows[0]["fits"]


def test_by_estimate_alone_nothing_is_compiled(config, to, tmp_path, monkeypatch):
  rows, seen = sweep(config, to, tmp_path, monkeypatch, lambda c: True, top=0)
  assert not seen and len(rows) == 1 and rows[0]["fits"]
  assert "nothing was compiled for sft_short" in sweep_lib.format_sweep(rows)


def test_every_shard_has_slots_for_the_responses_of_a_prompt(config):
  config.grpo.update(batch_size=8, samples=4, minibatches=1, slots=8)
  found = sweep_lib.list_meshes(config, "grpo", 4)
  assert {m["data"] * m["fsdp"] for m in found} == {1, 2}
  config.grpo.slots = 32  # Room for all: nobody takes turns.
  found = sweep_lib.list_meshes(config, "grpo", 4)
  assert {m["data"] * m["fsdp"] for m in found} == {1, 2, 4}


def test_context_is_tried_where_rows_are_long(config, to):
  (passes,) = [sweep_lib._list_passes(config, to, "sft_short")]
  assert sweep_lib.is_spreadable(passes, 1) and not sweep_lib.is_spreadable(passes, 2)
  long = [p._replace(time=4096, chunk=128) for p in passes]
  assert sweep_lib.is_spreadable(long, 2) and not sweep_lib.is_spreadable(long, 4)
  odd = [p._replace(phase="train", time=8191) for p in passes]
  assert not sweep_lib.is_spreadable(odd, 2)


def test_a_group_is_not_divided(config):
  config.grpo.update(batch_size=8, samples=3)
  assert sweep_lib.list_microbatches(config, "grpo", shards=2) == [1, 2]
  assert all(
    m["data"] * m["fsdp"] <= 4 for m in sweep_lib.list_meshes(config, "grpo", 8)
  )


def test_a_mesh_that_does_not_do_is_answered_with_one_that_does(config, to):
  stages = ["sft_short", "ppo"]
  assert not sweep_lib.find_mesh_error(config, to, stages)
  config.ppo.microbatches = 2
  assert "ppo.batch_size: 8 rows in 4 parts" in sweep_lib.find_mesh_error(
    config, to, stages
  )
  config.mesh.update(fsdp=1, tensor=4, data=1)
  config.model.path = "nowhere"
  config.model.size = "qwen2_1.5b"  # Of two key and value heads.
  assert "tensor=4" in sweep_lib.find_mesh_error(config, to, stages)


def test_the_mesh_instead_is_one_for_all_stages(config, to):
  line, rows = sweep_lib.find_fitting_mesh(
    config, to, ["sft_short", "ppo"], lambda line: None
  )
  assert [row["stage"] for row in rows] == ["sft_short", "ppo"]
  assert rows[0]["mesh"] == rows[1]["mesh"] and all(row["fits"] for row in rows)
  assert line.count("--config.mesh.fsdp=") == 1
  assert "--config.ppo.microbatches=" in line and "--config.sft.microbatches=" in line


def test_a_slice_that_holds_no_stage_is_said_so(config, to):
  tight = to._replace(chip=CHIP._replace(memory=1e4))
  with pytest.raises(ValueError, match="cpu-4.*no mesh fits sft"):
    sweep_lib.find_fitting_mesh(config, tight, ["sft_short"], lambda line: None)
