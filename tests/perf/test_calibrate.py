from configs import prices
from perf import calibrate
from tests.helpers import small
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.planner import abstract_run, plan, topologies

OWN = topologies.Chip(
  flops=1e11,
  memory=2e9,
  bandwidth=1e10,
  links=1e9,
  latency=1e-5,
  host=topologies.Host(1e11, 1e10, 1e10, 1e-9),
)


def test_predictions_are_held_against_the_clock(tiny_settings, tmp_path, monkeypatch):
  monkeypatch.setattr(calibrate, "measure_chip", lambda config, note: OWN)
  monkeypatch.setattr(calibrate, "_MIN_SECONDS", 0.0)
  to = plan.make_target("cpu-4", prices.get_config(), OWN)
  config, quiet = small.config(tiny_settings), lambda line: None
  measured = calibrate.measure_stages(config, to, ["sft_short"], tmp_path, quiet)
  assert [m["function"] for m in measured] == ["encode", "update"]
  assert all(m["measured"] > 0 and m["predicted"] > 0 for m in measured)
  assert all(len(m["ratios"]) == 3 for m in measured)


def test_the_error_is_of_the_median_of_all_rounds():
  one = dict(stage="sft", function="update", predicted=1.0, measured=2.0)
  rows = [{**one, "ratios": [1.0, 2.0, 9.0]}, {**one, "ratios": [0.1, 0.5, 0.6]}]
  told = calibrate.format_table(rows)
  assert "**2.00** (1.00 to 9.00)" in told
  assert told.endswith("Typically off by a factor of 2.00.")


def test_this_machine_is_measured_with_the_model_s_own_matrices(
  tiny_settings, monkeypatch
):
  asked = []
  monkeypatch.setattr(calibrate, "_LONG_BYTES", 2**16)
  monkeypatch.setattr(calibrate, "_MIN_SECONDS", 0.0)
  count = lambda *shape: asked.append(shape) or 1e9
  monkeypatch.setattr(calibrate, "_measure_matmul", count)
  config = small.config(tiny_settings)
  made = calibrate.measure_chip(config, lambda line: None)
  llm = abstract_run.create_abstract_run(config, sharding.make_mesh(1, 4, 1)).policy.llm
  assert asked[-1][1:] == (llm.embed, llm.mlp)
  assert (
    made.bandwidth > 0 and min(made.host[:3]) > 0 and made.host.allocation_seconds >= 0
  )
