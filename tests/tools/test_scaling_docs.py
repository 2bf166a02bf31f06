import pytest

from tests.helpers.figures import check_figure
from tools import scaling_docs, scaling_points
from vlmrlaif_jax.planner import topologies

FUNCTION = dict(
  function="collect",
  peak=20 * 2**30,
  estimate=16 * 2**30,
  limit=16 * 2**30,
  compile_s=1.0,
  refused="",
)


def row(topology="v5e-64", **fields):
  made = dict(
    topology=topology,
    fits=True,
    rows=256,
    step_s=36.0,
    tokens_s_chip=1000.0,
    mfu=0.4,
    chip_hours=10.0,
    cost=20.0,
    functions=[FUNCTION],
    line="--config.mesh.data=1 --config.mesh.fsdp=64 --config.sft.microbatches=2",
  )
  return made | fields


def test_a_row_has_chip_hours_and_cost_of_a_thousand_steps():
  text = scaling_docs.make_document({"sft_v5e-64": row()})
  assert "| v5e-64 | 64 | 256 | yes | 20.0 of 16.0 | 36.0 | 1,000 | 40% " in text
  assert "| 640 | 1,280 | fsdp=64, microbatches=2 |" in text


def test_what_does_not_fit_names_what_it_lacks_and_has_no_time():
  text = scaling_docs.make_document({"ppo_v5e-64": row(fits=False)})
  assert "**no**: collect | 20.0 of 16.0 | - | - | - | - | - |" in text


def test_what_was_not_compiled_is_said_to_be_an_estimate():
  guess = row(functions=[{**FUNCTION, "compile_s": 0}])
  assert "yes, estimate" in scaling_docs.make_document({"dpo_v5e-64": guess})


def test_estimates_are_held_against_compilers():
  text = scaling_docs.make_document({"sft_v5e-64": row()})
  assert "Of the 1 functions" in text and "is 1.25 times" in text


def test_points_that_are_not_there_are_named():
  text = scaling_docs.make_document({"sft_v5e-64": row()})
  missing = text.partition("## Missing")[2]
  assert "ppo_v5e-64" in missing and "group_h200-8_16" in missing
  assert " sft_v5e-64" not in missing


@pytest.mark.parametrize(
  "names", [(), ("sft_v5e-64", "frames_ppo_v5e-64_8", "group_v5e-64_4")]
)
def test_figures_are_drawn_of_what_there_is(tmp_path, names):
  scaling_docs.write(tmp_path / "scaling.md", {name: row() for name in names})
  for name in ("chips", "curves"):
    check_figure(tmp_path / f"figures/scaling_{name}.png")


@pytest.mark.parametrize(
  "point", scaling_points.list_points()[:8], ids=lambda p: p.name
)
def test_every_point_is_of_settings_that_there_are(point):
  config = point.make_config()
  assert config.model.attention == ("cudnn" if "00-8" in point.topology else "splash")
  assert point.stage in config.stages or config.recipe == "grpo_rank"
  assert topologies.parse_topology(point.topology).chips >= 4
