import pytest

from configs import prices
from tests.helpers import small
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.planner import abstract_run, plan, topologies
from vlmrlaif_jax.planner.collectives import Collective

CHIP = topologies.Chip(flops=1e11, memory=2e9, bandwidth=1e10, links=1e9, latency=1e-5)


@pytest.fixture(scope="module")
def run(tiny_settings):
  config = small.config(tiny_settings, ppo__batch_size=8)
  return abstract_run.create_abstract_run(config, sharding.make_mesh(1, 4, 1))


@pytest.fixture(scope="module")
def ppo(run):
  (made,) = abstract_run.plan_recipe_stages(run, ["ppo"])
  return made


def row(run, stage, **assumed):
  given = prices.get_config()
  given.update_from_flattened_dict(assumed)
  return plan.plan_stage(run, stage, plan.make_target("cpu-4", given, CHIP))


def test_reading_prompts_and_decoding_are_told_apart(run, ppo):
  collect = row(run, ppo)["functions"][1]
  phases = [f"{p['phase']} {p['role']}" for p in collect["phases"]]
  assert phases[:3] == ["prefill policy", "decode policy", "forward reward"]
  assert all(p["roofline"] > 0 for p in collect["phases"])


def test_a_step_is_all_that_runs_in_it(run, ppo):
  made = row(run, ppo)
  parts = {f["function"]: f["runs"] * f["seconds"] for f in made["functions"]}
  assert made["step_s"] == pytest.approx(sum(parts.values()))
  assert made["functions"][-1]["runs"] == 2  # An epoch of two minibatches.


def test_a_program_that_reaches_half_takes_twice_as_long(run, ppo):
  half = {f"reached.{name}": 0.25 for name in ("compute", "memory", "links")}
  whole = dict.fromkeys(half, 0.5)
  slow, fast = row(run, ppo, **half), row(run, ppo, **whole)
  assert slow["step_s"] == pytest.approx(2 * fast["step_s"])
  assert slow["mfu"] == pytest.approx(fast["mfu"] / 2)


def test_cost_is_chip_hours_at_the_price(run, ppo):
  given = prices.get_config()
  given.chip_hour.update(v5e=2.0)
  to = plan.Target(topologies.parse_topology("v5e-4"), CHIP, [], given)
  made = plan.plan_stage(run, ppo, to)
  assert made["chip_hours"] == pytest.approx(
    ppo.workload.steps * made["step_s"] * 4 / 3600
  )
  assert made["cost"] == pytest.approx(2.0 * made["chip_hours"])
  summary = f"{made['cost']:,.0f} USD at list price"
  assert summary in plan.format_plan(made, "USD")


def test_this_machine_has_no_data_sheet():
  with pytest.raises(ValueError, match="--measure"):
    plan.make_target("cpu-1", prices.get_config())


def test_what_leaves_too_little_free_does_not_fit(run, ppo):
  made = row(run, ppo)
  peak = max(f["peak"] for f in made["functions"])
  near = CHIP._replace(memory=peak / 0.9)  # 10 % free, of the 12 % asked for.
  to = plan.make_target("cpu-4", prices.get_config(), near)
  assert made["fits"] and not plan.plan_stage(run, ppo, to)["fits"]


def test_a_table_names_functions_roles_and_what_binds(run, ppo):
  told = plan.format_plan(row(run, ppo), "USD")
  assert "ppo on cpu-4, mesh data=1 fsdp=4" in told
  assert "collect | decode policy" in told and "update | train critic" in told
  assert "tokens/s/chip" in told and "chip-hours" in told


def test_a_table_lists_collectives(run, ppo):
  made = row(run, ppo)
  gathers = Collective("all-gather", bytes=2e9, runs=7.0, group=4, loop="decode")
  made["functions"][1]["collectives"] = [gathers._asdict()]
  assert "collect: all-gather over 4 (decode) 2 GB in 7" in plan.format_plan(
    made, "USD"
  )


def test_what_does_not_fit_comes_with_a_remedy(run, ppo):
  assert row(run, ppo)["advice"] == ""
  small = plan.make_target("cpu-4", prices.get_config(), CHIP._replace(memory=1e4))
  told = plan.format_plan(plan.plan_stage(run, ppo, small), "USD")
  assert "ppo: collect does not fit" in told and "--config." in told
