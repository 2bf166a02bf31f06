import pytest

from configs import prices
from tests import small
from vlmrlaif_jax import plan, plan_sweep, sharding, topologies

CHIP = topologies.Chip(flops=1e11, memory=2e8, bandwidth=1e10, links=1e9, latency=1e-5)


@pytest.fixture
def config(tiny_settings):
  return small.config(tiny_settings, sft__batch_size=8, ppo__batch_size=8)


@pytest.fixture
def to():
  return plan.target("cpu-4", prices.get_config(), CHIP)


def sweep(config, to, tmp_path, monkeypatch, peak):
  """SFT's, with a compiler that says of each row what `peak` does."""

  def compiled(config, to, stages, cache, note):
    mesh = sharding.make_mesh(**config.mesh, devices=to.devices)
    run = plan_sweep.plan_run.make(config, mesh)
    (stage,) = plan_sweep.plan_stages.of_recipe(run, stages)
    row = plan.of_stage(run, stage, to)
    seen.append(dict(config.mesh))
    fits = peak(config)
    return [{**row, "fits": fits}]

  seen = []
  monkeypatch.setattr(plan, "plan", compiled)
  rows = plan_sweep.sweep(config, to, "sft_short", tmp_path, 2, lambda line: None)
  return rows, seen


def test_meshes_are_those_that_the_rows_spread_over(config):
  found = list(plan_sweep.meshes(config, "sft", 4))
  sizes = [(m["data"], m["fsdp"], m["tensor"]) for m in found]
  assert {(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1)} <= set(sizes)
  config.sft.batch_size = 2
  assert all(m["data"] * m["fsdp"] <= 2 for m in plan_sweep.meshes(config, "sft", 4))


def test_microbatches_divide_the_rows_of_an_update(config):
  assert plan_sweep.microbatches(config, "sft", shards=2) == [1, 2, 4]
  assert plan_sweep.microbatches(config, "ppo", shards=1) == [1, 2, 4]  # 2 minibatches.
  assert plan_sweep.microbatches(config, "label", shards=1) == [0]


def test_the_fastest_that_fit_come_first_with_the_line_to_paste(
  config, to, tmp_path, monkeypatch
):
  rows, seen = sweep(config, to, tmp_path, monkeypatch, lambda c: c.mesh.fsdp < 4)
  assert len(rows) == 2 < len(seen) + 1
  assert rows[0]["step_s"] <= rows[1]["step_s"]
  assert all(row["mesh"]["fsdp"] < 4 for row in rows)
  flags = "--config.mesh.data={data} --config.mesh.fsdp={fsdp} "
  assert rows[0]["line"].startswith(flags.format(**rows[0]["mesh"]))
  assert rows[0]["line"] in plan_sweep.table(rows)


def test_where_nothing_fits_the_nearest_is_told(config, to, tmp_path, monkeypatch):
  rows, seen = sweep(config, to, tmp_path, monkeypatch, lambda c: False)
  assert len(seen) == 6 and len(rows) == 1 and not rows[0]["fits"]
  assert "| NO |" in plan_sweep.table(rows)


def test_what_cannot_fit_is_not_compiled(config, to, tmp_path, monkeypatch):
  tight = to._replace(chip=CHIP._replace(memory=1e4))
  rows, seen = sweep(config, tight, tmp_path, monkeypatch, lambda c: True)
  assert not seen and not rows[0]["fits"]
